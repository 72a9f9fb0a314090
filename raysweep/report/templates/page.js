// One large surface of a cell, chosen from a strip.
(() => {
  const strip = document.getElementById("cells");
  if (!strip) return;
  const cells = [...strip.children];
  const choose = (cell) => {
    for (const other of cells) {
      other.classList.toggle("on", other === cell);
      other.querySelector(".pick").setAttribute("aria-pressed", String(other === cell));
    }
  };
  strip.classList.add("strip");
  for (const cell of cells) cell.addEventListener("click", () => choose(cell));
  choose(cells.find((cell) => "first" in cell.dataset) ?? cells[0]);
})();

// The table of trials.
(() => {
  const { read, make, styles } = kit;
  const trials = read("data-trials");
  const columns = trials.columns;
  const value = (column, row) =>
    column.values ? column.values[row] : column.codes[row] < 0 ? null : column.words[column.codes[row]];
  const csvOfTrials = () => {
    const cell = (v) => {
      if (v === null) return "";
      if (typeof v === "string" && /^[=+\-@\t\r]/.test(v)) v = `'${v}`; // no formula
      return /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v;
    };
    const lines = [columns.map((c) => c.name).join(",")];
    for (let row = 0; row < trials.shown; row++) lines.push(columns.map((c) => cell(value(c, row))).join(","));
    return lines.join("\n") + "\n";
  };

  kit.csv.trials = csvOfTrials;

  const table = document.getElementById("trial-table");
  if (!table) return;
  const form = document.getElementById("trial-filter");
  const PAGE = 8;
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

  // A trial's loss curve, beside that of the best trial of its cell.
  const named = (name) => columns.find((c) => c.name === name);
  const bestOf = (row) => {
    const cell = named("cell"), loss = named("loss");
    let best = null;
    for (let other = 0; other < trials.shown; other++)
      if (value(cell, other) === value(cell, row) && value(loss, other) !== null && trials.curves[other])
        if (best === null || value(loss, other) < value(loss, best)) best = other;
    return best;
  };
  const chart = (row, key) => {
    const best = bestOf(row);
    const lines = [[trials.curves[best] ?? [], "var(--faint)"], [trials.curves[row], "var(--c0)"]];
    const all = lines.flatMap(([losses]) => losses);
    const low = Math.min(...all), high = Math.max(...all);
    const x = (i, n) => 46 + (560 * i) / (n - 1), y = (v) => 12 + 118 * (1 - (v - low) / (high - low || 1));
    const svg = kit.draw(null, "svg", {});
    const add = (tag, attributes, text) => kit.draw(svg, tag, attributes, text);
    svg.setAttribute("viewBox", "0 0 620 160");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Training loss of trial ${key} from ${trials.curves[row][0]} to ${trials.curves[row].at(-1)}`);
    for (const level of [low, high]) {
      add("line", { x1: 46, x2: 606, y1: y(level), y2: y(level), stroke: "var(--grid)" });
      add("text", { x: 40, y: y(level) + 4, "text-anchor": "end" }, level.toFixed(2));
    }
    for (const [losses, colour] of lines)
      add("polyline", { fill: "none", stroke: colour, "stroke-width": 1.6, points: losses.map((v, i) => `${x(i, losses.length).toFixed(1)},${y(v).toFixed(1)}`).join(" ") });
    add("text", { x: 46, y: 150 }, "training loss, from the first step logged to the last" + (best === row ? "; the best trial of its cell" : "; grey: the best trial of its cell"));
    return svg;
  };
  const curveButton = (line, row, key) => {
    const button = make("button", key.slice(0, 8), "link");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) { line.nextSibling.remove(); return; }
      const below = make("tr", undefined, "curve");
      const cell = make("td");
      cell.colSpan = columns.length;
      cell.append(chart(row, key));
      below.append(cell);
      line.after(below);
    });
    return button;
  };

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
        if (column.kind === "key") {
          cell.title = text;
          if (trials.curves[row]) cell.replaceChildren(curveButton(line, row, v));
        }
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
