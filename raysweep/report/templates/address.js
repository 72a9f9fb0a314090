// What the reader has set stands behind the # of the page's address: back, forward and a copied
// link bring it again. Each part of the page tells its settings, and takes them back.
const address = (() => {
  const parts = [];
  const SOON = 1500; // changes of one thing so close in time are one step back, in ms
  let held = false, last = "", at = -SOON;

  /** All settings as text; with `whole` also those that stand as the page came. */
  const text = (whole = false) => {
    const all = new URLSearchParams();
    for (const part of parts) part.tell(all, whole);
    return all.toString();
  };
  const settings = (state = history.state) => new URLSearchParams(state?.asked ?? (location.hash.includes("=") ? location.hash.slice(1) : ""));
  /** Runs `work` without a word of it in the history. */
  const quietly = (work) => {
    const before = held;
    held = true;
    try { work(); } finally { held = before; }
  };
  /** A part of the page: `tell(all, whole)` puts its settings, `take(given)` sets them, or what the page came with. */
  const add = (part) => {
    parts.push(part);
    quietly(() => part.take(settings()));
  };
  /** To be called when the reader has changed a setting; `what` names which. */
  const changed = (what) => {
    if (held) return;
    const now = performance.now(), same = what === last && now - at < SOON;
    [last, at] = [what, now];
    const asked = text(), url = asked ? `#${asked}` : location.href.split("#")[0];
    if (same) history.replaceState({ ...history.state, asked }, "", url);
    else history.pushState({ asked }, "", url);
  };
  addEventListener("popstate", ({ state }) => {
    last = "";
    // A link within the page: nothing is set anew, and coming back here is to bring what is set now.
    if (location.hash && !location.hash.includes("=") && state?.asked === undefined) history.replaceState({ ...state, asked: text() }, "");
    else quietly(() => { for (const part of parts) part.take(settings(state)); });
  });
  return { add, changed, quietly, link: () => `${location.href.split("#")[0]}#${text(true)}` };
})();
