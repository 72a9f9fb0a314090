// A live page: asks its neighbour live.js whether there is a newer one, and loads it without
// losing the reader's place: scroll position, what is typed, filters, what is folded out.
(() => {
  const stamp = document.body.dataset.live;
  if (!stamp) return;
  const badge = document.getElementById("live");
  const POLL = 2000, QUIET = 3000;
  let heard = false, touched = 0;
  for (const kind of ["input", "keydown", "pointerdown", "wheel", "touchmove"])
    addEventListener(kind, () => { touched = Date.now(); }, { passive: true, capture: true });

  const fields = () => [...document.forms].flatMap((form) => [...form.elements].filter((e) => e.name).map((e) => [form.id, e]));
  const find = (id, name) => document.getElementById(id)?.elements[name];
  const folds = () => [...document.querySelectorAll("details")];
  const heading = () => document.querySelector("#trial-table th[aria-sort]");

  const remember = () => {
    const top = [...document.querySelectorAll("main > section")].findLast((s) => s.getBoundingClientRect().top < 120);
    const at = document.activeElement;
    const typing = at?.form && at.name ? { form: at.form.id, name: at.name, start: at.selectionStart, end: at.selectionEnd } : null;
    return {
      anchor: top ? { id: top.id, offset: -top.getBoundingClientRect().top } : null,
      y: scrollY,
      fields: fields().map(([form, e]) => [form, e.name, e.value]),
      open: folds().map((d) => [d.querySelector("summary")?.textContent, d.open]),
      sort: heading() ? [heading().textContent, heading().getAttribute("aria-sort")] : null,
      page: Number(/\d+/.exec(document.getElementById("trial-page")?.textContent ?? "1")?.[0] ?? 1),
      tabs: [...document.querySelectorAll(".tabs > input:checked")].map((tab) => tab.id),
      cell: document.querySelector("#cells .on .what")?.textContent.split(":")[0],
      typing,
    };
  };

  const restore = (was) => {
    for (const [form, name, value] of was.fields) {
      const field = find(form, name);
      if (!field || field.value === value) continue;
      if (field.options && ![...field.options].some((o) => o.value === value)) continue;
      field.value = value;
      field.dispatchEvent(new Event("input", { bubbles: true }));
    }
    for (const fold of folds()) {
      const before = was.open.find(([text]) => text === fold.querySelector("summary")?.textContent);
      if (before) fold.open = before[1];
    }
    if (was.sort) {
      const button = [...document.querySelectorAll("#trial-table th button")].find((b) => b.textContent === was.sort[0]);
      button?.click();
      if (was.sort[1] === "descending") button?.click();
    }
    for (let k = 1; k < was.page; k++) document.getElementById("trial-on")?.click();
    for (const id of was.tabs) document.getElementById(id)?.click();
    [...document.querySelectorAll("#cells .cell")].find((c) => c.querySelector(".what").textContent.split(":")[0] === was.cell)?.click();
    const section = was.anchor && document.getElementById(was.anchor.id);
    const y = section ? section.getBoundingClientRect().top + scrollY + was.anchor.offset : was.y;
    scrollTo({ top: y, behavior: "instant" });
    if (was.typing) {
      const field = find(was.typing.form, was.typing.name);
      field?.focus({ preventScroll: true });
      if (field?.setSelectionRange && was.typing.start !== null && was.typing.start !== undefined) field.setSelectionRange(was.typing.start, was.typing.end);
    }
  };

  const was = history.state?.raysweep;
  const reload = (wanted) => {
    // Never while the reader is at something: typing, scrolling, selecting. And only once for one
    // page: what stands there after that is all there is.
    if (Date.now() - touched < QUIET || !(getSelection()?.isCollapsed ?? true)) return;
    if (was?.wanted === wanted) return;
    history.replaceState({ ...history.state, raysweep: { ...remember(), wanted } }, "");
    location.reload();
  };

  window.raysweepLive = ({ stamp: newest, at }) => {
    heard = true;
    if (newest !== stamp) { reload(newest); return; }
    const quiet = Date.now() / 1000 - at > 90;
    badge.textContent = quiet ? "No longer updated: whoever kept this page up to date is gone" : badge.dataset.text;
  };
  badge.dataset.text = badge.textContent;

  const poll = () => {
    const script = document.createElement("script");
    script.src = `live.js?${Date.now()}`;
    script.onload = () => script.remove();
    script.onerror = () => {
      script.remove();
      if (heard) reload(`after ${stamp}`); // it has just ended: the page that stands there now is the last one
      else badge.textContent = "No longer updated";
    };
    document.head.append(script);
  };
  if (was) address.quietly(() => restore(was));
  setInterval(poll, POLL);
})();
