// Hover texts of figures, and downloads of their data.
(() => {
  const { make } = kit;
  const tip = document.getElementById("tip");
  const CLOSE = 24; // pixels within which the nearest mark is meant
  const nearest = (svg, { clientX, clientY }) => {
    for (const title of svg.querySelectorAll("title")) { title.parentNode.dataset.tip = title.textContent; title.remove(); }
    let best = null, least = CLOSE;
    for (const holder of svg.querySelectorAll("[data-tip]")) {
      const box = holder.getBoundingClientRect();
      const off = Math.hypot((box.left + box.right) / 2 - clientX, (box.top + box.bottom) / 2 - clientY);
      if (off < least) [best, least] = [holder, off];
    }
    return best;
  };
  const hint = (event) => {
    const svg = event.target.closest?.(".static svg, .charts svg");
    const holder = svg && nearest(svg, event);
    if (!holder) { tip.hidden = true; return; }
    tip.textContent = holder.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, hint);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const csv = async (name) => {
    const rows = [["x_is", "y_is", "what", "name", "x", "y", "low", "high"]];
    for (const { x, y, series } of (await kit.figure(name)).panels)
      for (const s of series)
        s.x.forEach((v, i) => rows.push([x.label, y.label, s.name, s.names?.[i], v, y.names[Math.round(s.y[i])] ?? s.y[i], s.low?.[i], s.high?.[i]]));
    return kit.csv.text(rows);
  };
  for (const button of document.querySelectorAll("[data-csv]"))
    button.addEventListener("click", async () => {
      const name = button.dataset.csv;
      const text = kit.csv[name]?.() ?? (await csv(name));
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
})();
