// The laws' tabs.
(() => {
  const tabs = [...document.querySelectorAll(".tabs > input")];
  if (!tabs.length) return;
  const named = (name) => tabs.find((tab) => tab.id === `tab-${name}`);
  for (const tab of tabs) tab.addEventListener("change", () => address.changed("tab"));
  address.add({
    tell: (all) => { if (!tabs[0].checked) all.set("tab", tabs.find((tab) => tab.checked).id.slice(4)); },
    take: (given) => { (named(given.get("tab")) ?? tabs[0]).checked = true; },
  });
})();

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
  const touched = (cell) => { choose(cell); plots.show(cell); };
  strip.classList.add("strip");
  for (const cell of cells)
    cell.addEventListener("click", () => { if (!cell.classList.contains("on")) touched(cell); });
  document.addEventListener("cell", ({ detail }) => {
    const cell = cells.find((c) => c.dataset.cell === detail);
    if (!cell) return;
    touched(cell);
    if (matchMedia("(pointer: fine)").matches) strip.scrollIntoView({ block: "nearest" }); // a tap is to read
  });
  document.addEventListener("trial", ({ detail: { row, figure } }) => {
    figure.querySelector(".opened")?.remove();
    const opened = kit.opened?.(row);
    if (opened) figure.append(opened);
  });
  choose(cells.find((cell) => "first" in cell.dataset) ?? cells[0]);
})();

// The table of trials.
(() => {
  const { read, make, styles } = kit;
  const trials = read("data-trials");
  const columns = trials.columns;
  const value = (column, row) =>
    column.values ? column.values[row] : column.codes[row] < 0 ? null : column.words[column.codes[row]];
  kit.csv.trials = () => kit.csv.text([columns.map((c) => c.name), ...Array.from({ length: trials.shown }, (_, row) => columns.map((c) => value(c, row)))]);

  const table = document.getElementById("trial-table");
  if (!table) return;
  const form = document.getElementById("trial-filter");
  const PAGE = 8;
  let sorted = null, descending = false, page = 0;
  let rows = [...Array(trials.shown).keys()];
  let picked = null; // rows selected in a surface

  for (const name of ["cell", "status"]) {
    const column = columns.find((c) => c.name === name);
    for (const word of column ? column.words : []) {
      const option = make("option", word);
      option.value = word;
      form.elements[name].append(option);
    }
  }
  // From and to of what is a size, a setting or the loss; the parallel axes write them too.
  const RANGES = ["params_active_non_embedding", "tokens", "learning_rate", "batch_tokens", "loss"];
  const ranged = RANGES.map((name) => columns.find((c) => c.name === name)).filter(Boolean);
  for (const column of ranged) {
    const label = make("span", column.heading);
    for (const end of ["from", "to"]) {
      const input = make("input");
      Object.assign(input, { name: `${end}_${column.name}`, placeholder: end, autocomplete: "off", ariaLabel: `${column.heading} ${end}` });
      label.append(input);
    }
    document.getElementById("trial-ranges").append(label);
  }
  const limits = (column) => ["from", "to"].map((end, i) => {
    const value = kit.amount(form.elements[`${end}_${column.name}`].value);
    return Number.isNaN(value) ? [-Infinity, Infinity][i] : value;
  });

  const isNumber = (column) => !["text", "key"].includes(column.kind);
  const head = make("tr");
  for (const column of columns) {
    const numeric = isNumber(column);
    const cell = make("th", undefined, numeric ? "num" : "");
    cell.scope = "col";
    const button = make("button", column.heading);
    button.type = "button";
    button.addEventListener("click", () => {
      sort(column, sorted === column && !descending);
      update();
      address.changed("sort");
    });
    cell.append(button);
    head.append(cell);
  }
  table.tHead.append(head);

  const sort = (column, down) => {
    [sorted, descending] = [column, down];
    columns.forEach((c, i) => {
      if (c === sorted) head.children[i].setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.children[i].removeAttribute("aria-sort");
    });
  };

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
    const between = ranged.map((c) => [c, ...limits(c)]).filter(([, low, high]) => low > -Infinity || high < Infinity);
    rows = [];
    for (let row = 0; row < trials.shown; row++) {
      if (exact.some((c) => value(c, row) !== wanted[c.name])) continue;
      if (picked && !picked.has(row)) continue;
      if (between.some(([c, low, high]) => { const v = value(c, row); return v === null || v < low || v > high; })) continue;
      if (text && !words.some((c) => String(value(c, row) ?? "").toLowerCase().includes(text))) continue;
      rows.push(row);
    }
    document.getElementById("trial-clear").hidden = !(text || exact.length || between.length || picked);
    tell(rows.length < trials.shown);
  };
  // Surfaces, laws and parallel axes show what is kept: after a moment, for it costs a drawing.
  let waiting = 0;
  const tell = (some) => {
    const detail = some ? { rows: new Set(rows), cells: new Set(rows.map((r) => trials.cells[trials.of[r]])) } : null;
    kit.parallel?.show(rows, ranged.map(limits));
    clearTimeout(waiting);
    waiting = setTimeout(() => document.dispatchEvent(new CustomEvent("brush", { detail })), 120);
  };
  const lineOf = (row) => {
    const line = make("tr");
    for (const column of columns) {
      const v = value(column, row);
      const text = v === null ? "–" : styles[column.kind](v);
      const cell = make("td", column.kind === "key" ? text.slice(0, 8) : text, isNumber(column) ? "num" : column.name === "why" ? "wrap" : "");
      if (column.kind === "key") {
        cell.title = text;
        if (trials.curves[row]) cell.replaceChildren(curveButton(line, row, v));
      }
      line.append(cell);
    }
    return line;
  };
  /** A trial's row and curve, to stand where its dot was clicked; nothing where it is not here. */
  kit.opened = (row) => {
    if (row < 0) return null;
    const box = make("div", undefined, "scroll opened"), small = make("table"), top = make("tr");
    for (const column of columns) top.append(make("th", column.heading, isNumber(column) ? "num" : ""));
    small.createTHead().append(top);
    small.createTBody().append(lineOf(row));
    box.append(small);
    small.querySelector("tbody button")?.click();
    return box;
  };

  /** What a dot says of its trial. */
  kit.said = (row) => {
    const tell = (name, word) => { const c = named(name), v = c && value(c, row); return v === null || v === undefined ? [] : [`${word}${styles[c.kind](v)}`]; };
    const status = named("status");
    return [...(status && value(status, row) !== "finished" ? [value(status, row)] : []), ...tell("learning_rate", "lr "), ...tell("batch_tokens", "batch "), ...tell("loss", "loss "), ...tell("gap", "above best ")].join(", ");
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
    for (const row of rows.slice(page * PAGE, (page + 1) * PAGE)) body.append(lineOf(row));
    table.tBodies[0].replaceWith(body);
    document.getElementById("trial-count").textContent = `${rows.length} of ${trials.shown} trials`;
    document.getElementById("trial-page").textContent = `page ${page + 1} of ${pages}`;
    document.getElementById("trial-back").disabled = page === 0;
    document.getElementById("trial-on").disabled = page >= pages - 1;
  };
  form.addEventListener("input", ({ target }) => {
    update();
    address.changed(target.name);
  });
  document.addEventListener("picked", ({ detail }) => {
    picked = detail.length ? new Set(detail) : null;
    update();
  });
  document.getElementById("trial-clear").addEventListener("click", () => {
    form.reset();
    picked = null;
    update();
    address.changed("clear");
  });
  kit.parallel = ranged.length > 1 && parallel(document.getElementById("parallel"), {
    axes: ranged.map((c) => ({ label: c.heading, style: c.kind, values: c.values })),
    colours: (row) => read("data-page").colours[value(named("architecture"), row)] ?? "c0",
    shown: trials.shown,
    keep: (k, ends) => {
      ["from", "to"].forEach((end, i) => { form.elements[`${end}_${ranged[k].name}`].value = ends ? kit.exact(ends[i]) : ""; });
      update();
      address.changed(ranged[k].name);
    },
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("trial-back").addEventListener("click", () => { page--; draw(); });
  document.getElementById("trial-on").addEventListener("click", () => { page++; draw(); });
  const fields = [...form.elements].filter((e) => e.name && e.type !== "submit");
  address.add({
    tell: (all) => {
      for (const field of fields) if (field.value.trim()) all.set(field.name, field.value.trim());
      if (sorted) all.set("sort", `${descending ? "-" : ""}${sorted.name}`);
    },
    take: (given) => {
      for (const field of fields) field.value = given.get(field.name) ?? "";
      const by = given.get("sort") ?? "";
      sort(named(by.replace(/^-/, "")) ?? null, by.startsWith("-"));
      update();
    },
  });
})();
