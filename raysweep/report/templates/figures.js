// Hover texts of figures, and downloads of their data.
(() => {
  const { read, make } = kit;
  const tip = document.getElementById("tip");
  const hint = (event) => {
    const target = event.target.closest && event.target.closest("svg *");
    const title = target && (target.querySelector(":scope > title") || target.parentNode.querySelector(":scope > title"));
    if (title) { title.parentNode.dataset.tip = title.textContent; title.remove(); }
    const holder = target && target.closest("[data-tip]");
    if (!holder) { tip.hidden = true; return; }
    tip.textContent = holder.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
  };
  document.addEventListener("pointerover", hint);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  const csv = read("data-csv");
  for (const button of document.querySelectorAll("[data-csv]"))
    button.addEventListener("click", () => {
      const name = button.dataset.csv;
      const text = kit.csv[name]?.() ?? csv[name];
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
})();
