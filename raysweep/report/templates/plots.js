// Figures that can be explored: Plotly, unpacked when the first of them is seen, draws their data.
// What stands there without it, matplotlib's picture, is for print and for pages without scripts.
const plots = (() => {
  const { make, styles, significant } = kit;
  const NARROW = 640, LARGE = 370, CLOSE = 30, BESIDE = 12;
  const MARKS = { o: "circle", s: "square", "^": "triangle-up", D: "diamond", v: "triangle-down", P: "cross", x: "x-thin", "*": "star" };
  const coarse = matchMedia("(pointer: coarse)").matches;

  let library = null;
  const unpacked = async () => {
    document.head.append(make("script", await kit.unpack("plotly")));
    return window.Plotly;
  };
  const load = () => (library ??= unpacked());

  const colour = (role) => getComputedStyle(document.documentElement).getPropertyValue(`--${role}`).trim();
  const faded = (hex, share) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join()},${share})`;
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const write = (value, style) => (styles[style] ?? ((v) => significant(v, 3)))(value);
  const log10 = (v) => Math.log10(v);

  // --- from data to traces -----------------------------------------------------------------------
  const told = (s, panel, i) => {
    if (s.rows?.[i] >= 0 && kit.said) return kit.said(s.rows[i]);
    const at = panel.y.names.length ? "" : ` at ${panel.x.label.split(",")[0]} ${write(s.x[i], panel.x.style)}`;
    const value = panel.y.names.length ? write(s.x[i], panel.x.style) : write(s.y[i], panel.y.style);
    return `${s.names?.[i] ?? s.name}: ${value}${at}`;
  };
  const texts = (s, panel) => s.x.map((_, i) => (s.x[i] === null || s.y[i] === null ? "" : plain(s.tips?.[i] ?? told(s, panel, i))));

  const band = (s) => {
    const known = s.x.map((_, i) => i).filter((i) => s.low[i] !== null && s.high[i] !== null);
    const back = [...known].reverse();
    return {
      type: "scatter", mode: "lines", fill: "toself", hoverinfo: "skip", line: { width: 0 }, fillcolor: faded(colour(s.colour), 0.13),
      x: [...known, ...back].map((i) => s.x[i]), y: [...known.map((i) => s.high[i]), ...back.map((i) => s.low[i])],
    };
  };
  const line = (s) => ({
    type: "scatter", mode: "lines", x: s.x, y: s.y, hoverinfo: "skip",
    line: { color: colour(s.colour), width: s.thin ? 1.1 : s.dashed ? 1.3 : 2, dash: s.dashed ? "5px,3px" : "solid" },
  });
  /** Where a line answers the pointer: its points, but for those beside a dot, which is meant there. */
  const along = (s, panel, wide, high) => {
    const scale = (a, size) => {
      const [low, up] = a.limits.map(a.log ? Math.log : Number);
      return (v) => (size * ((a.log ? Math.log(v) : v) - low)) / (up - low);
    };
    const [px, py] = [scale(panel.x, wide), scale(panel.y, high)];
    const dots = panel.series.filter((o) => o.kind === "points").flatMap((o) => o.x.map((x, i) => [px(x), py(o.y[i])]));
    const far = s.x.map((_, i) => i).filter((i) => s.y[i] !== null && dots.every(([x, y]) => Math.hypot(x - px(s.x[i]), y - py(s.y[i])) > BESIDE));
    const text = texts(s, panel);
    return { type: "scatter", mode: "markers", marker: { opacity: 0, size: 6 }, hovertemplate: "%{text}<extra></extra>", x: far.map((i) => s.x[i]), y: far.map((i) => s.y[i]), text: far.map((i) => text[i]) };
  };
  const points = (s, panel, by) => {
    const paper = colour("paper"), own = colour(s.colour), n = s.x.length;
    const solid = Array.from({ length: n }, (_, i) => s.full?.[i] !== 0);
    const shades = by && s.shades?.[by.name]?.map(log10);
    const fills = shades ?? (s.fills ?? Array(n).fill(s.colour)).map(colour);
    const cross = s.marker === "x";
    const marker = { symbol: MARKS[s.marker], size: Math.sqrt(s.size) * 1.45, opacity: 1 };
    if (shades) Object.assign(marker, { color: shades, cmin: by.low, cmax: by.high, colorscale: by.scale, line: { color: paper, width: 0.8 } });
    else {
      marker.color = fills.map((c, i) => (solid[i] || cross ? c : paper));
      marker.line = { color: fills.map((c, i) => (cross ? own : solid[i] ? paper : c)), width: solid.map((full) => (cross ? 1.5 : full ? 0.8 : 1.6)) };
    }
    const trace = { type: "scatter", mode: "markers", x: s.x, y: s.y, text: texts(s, panel), hovertemplate: "%{text}<extra></extra>", marker };
    if (s.low) {
      const along = panel.y.names.length ? "x" : "y";
      const reach = (ends, sign) => s[along].map((v, i) => (ends[i] === null ? 0 : sign * (ends[i] - v)));
      trace[`error_${along}`] = { type: "data", symmetric: false, array: reach(s.high, 1), arrayminus: reach(s.low, -1), width: 0, thickness: 1.4, color: faded(own, 0.75) };
    }
    if (s.marker === "*") trace.cliponaxis = false;
    return trace;
  };
  /** Values between uneven borders as heights between whole numbers: one shade a step. */
  const height = (v, levels) => {
    const above = levels.findIndex((l) => v < l);
    if (above < 0) return levels.length + 1 - levels.at(-1) / Math.max(v, levels.at(-1));
    const low = above ? levels[above - 1] : 0;
    return above + Math.max(0, (v - low) / (levels[above] - low));
  };
  const contours = (s) => {
    const n = s.levels.length + 1;
    return {
      type: "contour", x: s.x, y: s.y, z: s.values.map((row) => row.map((v) => height(v, s.levels))), opacity: 0.55, showscale: false,
      text: s.values.map((row) => row.map((v) => `${(100 * v).toPrecision(2)} % above the optimum`)), hovertemplate: "%{text}<extra></extra>",
      zmin: 0, zmax: n, autocontour: false, contours: { start: 1, end: n - 1, size: 1, coloring: "fill" }, line: { width: 0.6, color: colour("paper") },
      colorscale: Array.from({ length: n }, (_, i) => [[i / n, colour(`h${i}`)], [(i + 1) / n, colour(`h${i}`)]]).flat(),
    };
  };

  // --- layout --------------------------------------------------------------------------------------
  const spread = (places, apart) => {
    const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
    const at = order.map((i) => places[i]);
    for (let round = 0; round < 60; round++)
      for (let i = 1; i < at.length; i++) {
        const push = (apart - (at[i] - at[i - 1])) / 2;
        if (push > 0) { at[i] += push; at[i - 1] -= push; }
      }
    const placed = [];
    order.forEach((i, k) => { placed[i] = at[k]; });
    return placed;
  };
  const ends = (panel, k, tall) => {
    const [from, to] = panel.x.limits.map(Math.log), [low, high] = panel.y.limits.map(Math.log);
    const found = panel.series.filter((s) => s.end).flatMap((s) => {
      const i = s.x.findLastIndex((x, j) => s.y[j] !== null && Math.log(x) <= to + 1e-9 && Math.log(x) >= from && Math.log(s.y[j]) > low && Math.log(s.y[j]) < high);
      return i < 0 ? [] : [{ s, i }];
    });
    const places = found.map(({ s, i }) => (tall * (Math.log(s.y[i]) - low)) / (high - low));
    const moved = spread(places, 13);
    return found.map(({ s, i }, j) => ({
      x: log10(s.x[i]), y: log10(s.y[i]), xref: `x${k}`, yref: `y${k}`, text: plain(s.end), showarrow: false, xanchor: "left", xshift: 4,
      yshift: moved[j] - places[j], font: { size: 11, color: colour(s.colour === "faint" ? "muted" : s.colour) },
    }));
  };
  const axis = (a, [from, to], anchor, room, titled) => {
    const both = {
      domain: [from, to], anchor, title: { text: titled ? a.label : "", standoff: 8, font: { size: 12, color: colour("muted") } }, gridcolor: colour("grid"),
      zeroline: false, linecolor: colour("faint"), showline: true, ticks: "outside", ticklen: 3, tickcolor: colour("faint"), tickfont: { size: 11.5, color: colour("muted") }, nticks: 6,
    };
    if (a.names.length)
      return { ...both, range: [a.names.length - 0.5, -0.5], tickvals: a.names.map((_, i) => i), ticktext: a.names.map(plain), showline: false, ticks: "", showgrid: false, tickfont: { size: 12, color: colour("ink") } };
    const range = a.limits.map(a.log ? log10 : Number);
    return { ...both, type: a.log ? "log" : "linear", range: a.reverse ? range.reverse() : range, ...(a.log ? marks(range, a.style, room) : {}) };
  };
  const marks = (range, style, room) => {
    const [low, high] = [...range].sort((a, b) => a - b).map((v) => v * Math.LN10);
    const at = kit.ticks(low, high, Math.max(3, Math.min(7, Math.floor(room))));
    return { tickmode: "array", tickvals: at, ticktext: at.map((v) => kit.tick(v, style)) };
  };

  /** Everything that Plotly is given for a figure so wide, as its buttons stand. */
  const made = (data, state, width) => {
    const names = data.panels[0].y.names;
    const panels = data.choose.length ? [data.panels[state.panel]] : data.panels.map((p) => (names.length && width < NARROW ? { ...p, y: { ...p.y, names } } : p));
    const down = width < NARROW, n = panels.length;
    const groups = [...new Set(panels.flatMap((p) => p.series.map((s) => s.legend).filter(Boolean)))];
    const legend = groups.length > 1;
    const longest = Math.max(0, ...names.map((v) => v.length));
    const margin = { l: Math.max(66, longest * 6.6 + 10), r: 14, t: legend ? 34 : 12, b: 48 };
    if (down && legend) { // the row of buttons, and below it the legend's
      let rows = 1, used = 0;
      for (const group of groups) {
        const needs = group.length * 6.8 + 50;
        if (used + needs > width - 90) { rows++; used = 0; }
        used += needs;
      }
      margin.t = 34 + 20 * rows;
    }
    const beyond = panels.map((p) => 5 + 6.2 * Math.max(0, ...p.series.map((s) => s.end?.length ?? 0)));
    if (!down || n === 1) margin.r += beyond.at(-1) > 5 ? beyond.at(-1) : 0;
    if (down) margin.r = Math.max(margin.r, ...beyond);
    const one = data.choose.length ? (down ? 300 : LARGE) : down && !names.length ? 250 : data.height;
    let by = null;
    if (state.by) {
      const values = data.panels.flatMap((p) => p.series.flatMap((s) => s.shades?.[state.by] ?? [])).map(log10);
      by = { name: state.by, low: Math.min(...values), high: Math.max(...values) + 1e-6, scale: [0, 1, 2, 3, 4].map((i) => [i / 4, colour(`h${i}`)]) };
      margin.t += down ? 40 : 14;
    }
    const gapDown = 62, inner = width - margin.l - margin.r;
    const tall = (down ? n : 1) * one + margin.t - 12;
    const plotTall = tall - margin.t - margin.b;
    const gaps = panels.map((p, i) => (i ? (p.y.names.length && !p.y.names[0] ? 26 : p.y.label === panels[i - 1].y.label ? 58 : 76) + (beyond[i - 1] > 5 ? beyond[i - 1] - 20 : 0) : 0));
    const ratios = panels.map((_, i) => data.ratios[i] ?? 1), share = ratios.reduce((a, b) => a + b);
    const across = inner - gaps.reduce((a, b) => a + b);
    const traces = [], series = [], layout = { annotations: [], shapes: [] };
    let left = 0;
    panels.forEach((panel, i) => {
      const k = i ? String(i + 1) : "";
      const wide = down ? inner : (across * ratios[i]) / share;
      const high = down ? (plotTall - gapDown * (n - 1)) / n : plotTall;
      left += down ? 0 : gaps[i];
      const x = down ? [0, 1] : [left / inner, (left + wide) / inner];
      const top = down ? 1 - (i * (high + gapDown)) / plotTall : 1;
      left += down ? 0 : wide;
      const y = [Math.max(0, top - high / plotTall), top];
      const titled = down || !i || panel.y.label !== panels[i - 1].y.label;
      layout[`xaxis${k}`] = axis(panel.x, x, `y${k}`, wide / 75, true);
      layout[`yaxis${k}`] = axis(panel.y, y, `x${k}`, high / 45, titled);
      // Dots first: of two marks as near, the pointer means the first. `zorder` draws them on top.
      const order = [...panel.series].sort((a, b) => (b.kind === "points") - (a.kind === "points"));
      for (const s of order) {
        const add = (trace, more = {}) => { traces.push({ ...trace, name: plain(s.legend || s.name), legendgroup: s.legend || s.name, showlegend: false, xaxis: `x${k}`, yaxis: `y${k}`, ...more }); series.push(s); };
        if (s.kind === "contours") add(contours(s));
        else if (s.kind === "points") add(points(s, panel, by), { zorder: 3 });
        else {
          if (s.low) add(band(s), { zorder: 1 });
          add(line(s), { zorder: 2 });
          if (!panel.y.names.length) add(along(s, panel, wide, high), { zorder: 2 });
        }
      }
      layout.annotations.push(...(panel.series.some((s) => s.end) ? ends(panel, k, high) : []));
      if (panel.neutral !== null) {
        const flat = panel.y.names.length ? "x" : "y", full = flat === "x" ? "y" : "x";
        layout.shapes.push({ type: "line", layer: "below", line: { color: colour("faint"), width: 1 }, [`${flat}ref`]: `${flat}${k}`, [`${full}ref`]: `${full}${k} domain`, [`${flat}0`]: panel.neutral, [`${flat}1`]: panel.neutral, [`${full}0`]: 0, [`${full}1`]: 1 });
      }
    });
    // What the legend shows is a mark of its own: the first dot may be hollow, or shaded.
    for (const group of legend ? groups : []) {
      const own = panels[0].series.concat(panels.slice(1).flatMap((p) => p.series)).filter((s) => s.legend === group);
      const s = own.find((one) => one.kind === "points") ?? own[0], c = colour(s.colour), cross = s.marker === "x";
      const mark = s.kind === "points" ? { mode: "markers", marker: { symbol: MARKS[s.marker], color: c, size: 8, line: { color: c, width: cross ? 1.5 : 0 } } } : { mode: "lines", line: { color: c, width: 2, dash: s.dashed ? "4px,3px" : "solid" } };
      traces.push({ type: "scatter", x: [null], y: [null], name: plain(group), legendgroup: group, showlegend: true, hoverinfo: "skip", ...mark });
      series.push({ kind: "legend" });
    }
    if (by) {
      const first = traces.find((t) => t.marker?.cmin !== undefined);
      const at = kit.ticks(by.low * Math.LN10, by.high * Math.LN10, 4);
      if (first) first.marker.colorbar = {
        orientation: "h", thickness: 8, len: down ? 0.6 : 0.3, x: 1, xanchor: "right", y: 1, yanchor: "bottom", ypad: 4, outlinewidth: 0, title: { text: by.name, side: "top", font: { size: 11, color: colour("muted") } },
        tickmode: "array", tickvals: at.map(log10), ticktext: at.map((v) => kit.short(v)), tickfont: { size: 10.5, color: colour("muted") },
      };
    }
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") };
    Object.assign(layout, {
      width, height: tall, margin, font, showlegend: legend, hovermode: "closest", hoverdistance: CLOSE, dragmode: coarse ? false : "zoom", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", xanchor: "left", bgcolor: "rgba(0,0,0,0)", font: { size: 12, color: colour("muted") }, itemsizing: "constant", groupclick: "togglegroup", itemwidth: 30 },
      hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { ...font, color: colour("paper") }, align: "left", namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("ink") },
    });
    return { traces, series, layout, panels };
  };

  // --- drawing -------------------------------------------------------------------------------------
  const drawn = new Map(); // figure element -> { plot, state, width, made }
  let brush = null; // { rows, cells }: the trials kept by the table's filters, and their cells

  const tell = (name, detail) => document.dispatchEvent(new CustomEvent(name, { detail }));
  const kept = (s) => {
    if (!brush || s.kind !== "points") return null;
    const [names, set] = s.rows ? [s.rows, brush.rows] : s.shades ? [s.names, brush.cells] : [];
    return names ? names.flatMap((name, i) => (set.has(name) ? [i] : [])) : null;
  };
  const brushed = (traces, series) => traces.map((t, i) => {
    const own = kept(series[i]);
    return own ? { ...t, selectedpoints: own, selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 0.12 } } } : t;
  });
  const config = (data) => ({
    displaylogo: false, doubleClick: "reset", showTips: false, displayModeBar: coarse || "hover", scrollZoom: false,
    modeBarButtons: [["zoom2d", "pan2d", ...(data.panels.some((p) => p.series.some((s) => s.rows)) ? ["select2d"] : []), "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  });
  const render = async (figure) => {
    const Plotly = await load();
    const own = drawn.get(figure), { data } = own;
    const width = Math.floor(figure.getBoundingClientRect().width);
    if (!width) return;
    own.width = width;
    own.made = made(data, own.state, width);
    const { traces, series, layout } = own.made;
    await Plotly.react(own.plot, brushed(traces, series), layout, config(data));
    figure.classList.add("drawn");
    if (own.heard) return;
    own.heard = true;
    listen(figure, own, Plotly);
  };
  const listen = (figure, own, Plotly) => {
    let busy = false;
    own.plot.on("plotly_relayout", async (change) => {
      if (busy || !Object.keys(change).some((key) => /axis\d*\.(range|autorange)/.test(key))) return;
      const update = {};
      own.made.panels.forEach((panel, i) => {
        for (const which of ["x", "y"]) {
          const name = `${which}axis${i ? i + 1 : ""}`;
          if (!panel[which].log) continue;
          for (const [key, value] of Object.entries(marks(own.plot.layout[name].range, panel[which].style, 6))) update[`${name}.${key}`] = value;
        }
      });
      busy = true;
      await Plotly.relayout(own.plot, update);
      busy = false;
    });
    own.plot.on("plotly_click", ({ points: [p] }) => {
      const s = own.made.series[p.curveNumber];
      if (s.rows) tell("trial", { row: s.rows[p.pointNumber], figure });
      else if (s.shades) tell("cell", s.names[p.pointNumber]);
    });
    own.plot.on("plotly_selected", (event) => {
      if (event) tell("picked", event.points.map((p) => own.made.series[p.curveNumber].rows?.[p.pointNumber] ?? -1).filter((row) => row >= 0));
    });
  };
  /** A row of buttons, one of them pressed: the element, and what presses another. */
  const buttons = (label, names, press) => {
    const group = make("span", label);
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", label);
    const own = names.map((name) => {
      const button = make("button", name);
      button.type = "button";
      button.addEventListener("click", () => press(name));
      group.append(button);
      return button;
    });
    return { group, mark: (name) => own.forEach((b, i) => b.setAttribute("aria-pressed", String(names[i] === name))) };
  };
  // What readers chose of a figure, by its name: the first choice is how the page came.
  const choices = new Map();
  const BY = ["architecture", "N", "D"];
  const chosen = (name, data) => {
    const own = choices.get(name) ?? {};
    return { x: data.choose.includes(own.x) ? own.x : data.choose[0], colour: BY.includes(own.colour) ? own.colour : BY[0] };
  };
  address.add({
    tell: (all) => {
      for (const [name, own] of choices) for (const [what, value] of Object.entries(own)) all.set(`${what}-${name}`, value);
    },
    take: (given) => {
      choices.clear();
      for (const [key, value] of given) {
        const [, what, name] = /^(x|colour)-(.+)$/.exec(key) ?? [];
        if (what) choices.set(name, { ...choices.get(name), [what]: value });
      }
      for (const own of drawn.values()) own.choose?.();
    },
  });
  const start = async (figure, own) => {
    const data = (own.data = await kit.figure(figure.dataset.plot));
    own.plot.setAttribute("role", "group");
    own.plot.setAttribute("aria-label", data.label);
    if (data.choose.length) {
      const name = figure.dataset.plot, tools = make("div", undefined, "tools");
      const choice = (what, label, names) => {
        const row = buttons(label, names, (value) => {
          choices.set(name, { ...choices.get(name), [what]: value });
          address.changed(`${what}-${name}`);
          own.choose();
        });
        tools.append(row.group);
        return () => row.mark(chosen(name, data)[what]);
      };
      const rows = [];
      if (data.choose.length > 1) rows.push(choice("x", "x-axis", data.choose));
      if (data.panels.some((p) => p.series.some((s) => s.shades))) rows.push(choice("colour", "colour", BY));
      const stand = () => {
        const { x, colour } = chosen(name, data);
        const before = own.state;
        own.state = { panel: data.choose.indexOf(x), by: colour === BY[0] ? "" : colour };
        for (const mark of rows) mark();
        return before.panel !== own.state.panel || before.by !== own.state.by;
      };
      stand();
      own.choose = () => { if (stand()) render(figure); };
      figure.querySelector(".static").before(tools);
    }
    figure.querySelector(".static").after(own.plot);
    await render(figure);
  };
  const show = (figure) => {
    if (drawn.has(figure)) return;
    const own = { plot: make("div", undefined, "plot"), state: { panel: 0, by: "" }, width: 0 };
    drawn.set(figure, own);
    start(figure, own).catch(() => { own.plot.remove(); }); // the picture stays
  };
  const wanted = (figure) => !figure.classList.contains("cell") || figure.classList.contains("on");

  const every = [...document.querySelectorAll("[data-plot]")];
  if ("DecompressionStream" in window) {
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) if (isIntersecting && wanted(target)) show(target);
    }, { rootMargin: "150px" });
    const sized = new ResizeObserver((entries) => {
      for (const { target } of entries) {
        const own = drawn.get(target);
        if (own?.width && target.classList.contains("drawn") && wanted(target) && Math.abs(target.getBoundingClientRect().width - own.width) > 1) render(target);
      }
    });
    for (const figure of every) { seen.observe(figure); sized.observe(figure); }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const [figure, own] of drawn) if (own.made) render(figure); });
    document.addEventListener("brush", ({ detail }) => {
      brush = detail;
      for (const [figure, own] of drawn) if (own.made?.series.some((s) => s.rows || s.shades)) render(figure);
    });
  }
  return { show: (figure) => { if ("DecompressionStream" in window) show(figure); }, drawn };
})();
