// Hover texts, downloads, and the table of trials.
(() => {
  const { read, make, styles } = page;
  // --- hover texts ---
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

  // --- trials ---
  const trials = read("data-trials");
  const columns = trials.columns;
  const value = (column, row) =>
    column.values ? column.values[row] : column.codes[row] < 0 ? null : column.words[column.codes[row]];
  const csvOfTrials = () => {
    const cell = (v) => (v === null ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
    const lines = [columns.map((c) => c.name).join(",")];
    for (let row = 0; row < trials.shown; row++) lines.push(columns.map((c) => cell(value(c, row))).join(","));
    return lines.join("\n") + "\n";
  };

  const csv = read("data-csv");
  for (const button of document.querySelectorAll("[data-csv]"))
    button.addEventListener("click", () => {
      const name = button.dataset.csv;
      const text = name === "trials" ? csvOfTrials() : csv[name];
      const link = make("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });

  const table = document.getElementById("trial-table");
  if (!table) return;
  const form = document.getElementById("trial-filter");
  const PAGE = 25;
  let sorted = null, descending = false, page = 0;
  let rows = [...Array(trials.shown).keys()];

  for (const name of ["cell", "status"]) {
    const column = columns.find((c) => c.name === name);
    for (const word of column ? column.words : []) {
      const option = make("option", word);
      option.value = word;
      form.elements[name].append(option);
    }
  }
  const head = make("tr");
  for (const column of columns) {
    const numeric = !["text", "key"].includes(column.kind);
    const cell = make("th", undefined, numeric ? "num" : "");
    cell.scope = "col";
    const button = make("button", column.heading);
    button.type = "button";
    button.addEventListener("click", () => {
      descending = sorted === column ? !descending : false;
      sorted = column;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      update();
    });
    cell.append(button);
    head.append(cell);
  }
  table.tHead.append(head);

  const keep = () => {
    const text = form.elements.text.value.trim().toLowerCase();
    const wanted = { cell: form.elements.cell.value, status: form.elements.status.value };
    const words = columns.filter((c) => c.kind === "text" || c.kind === "key");
    const exact = columns.filter((c) => wanted[c.name]);
    rows = [];
    for (let row = 0; row < trials.shown; row++) {
      if (exact.some((c) => value(c, row) !== wanted[c.name])) continue;
      if (text && !words.some((c) => String(value(c, row) ?? "").toLowerCase().includes(text))) continue;
      rows.push(row);
    }
  };
  const update = () => {
    keep();
    if (sorted) {
      const sign = descending ? -1 : 1;
      rows.sort((a, b) => {
        const x = value(sorted, a), y = value(sorted, b);
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      });
    }
    page = 0;
    draw();
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const body = make("tbody");
    for (const row of rows.slice(page * PAGE, (page + 1) * PAGE)) {
      const line = make("tr");
      for (const column of columns) {
        const v = value(column, row);
        const numeric = !["text", "key"].includes(column.kind);
        const text = v === null ? "–" : styles[column.kind](v);
        const cell = make("td", column.kind === "key" ? text.slice(0, 8) : text, numeric ? "num" : column.name === "why" ? "wrap" : "");
        if (column.kind === "key") cell.title = text;
        line.append(cell);
      }
      body.append(line);
    }
    table.tBodies[0].replaceWith(body);
    document.getElementById("trial-count").textContent = `${rows.length} of ${trials.shown} trials`;
    document.getElementById("trial-page").textContent = `page ${page + 1} of ${pages}`;
    document.getElementById("trial-back").disabled = page === 0;
    document.getElementById("trial-on").disabled = page >= pages - 1;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("trial-back").addEventListener("click", () => { page--; draw(); });
  document.getElementById("trial-on").addEventListener("click", () => { page++; draw(); });
  update();
})();
