// The answer: interpolates the grid of the fitted object's answers, and shows what it says.
const answers = (() => {
  const data = kit.read("data-answers");

  /** The four nodes about a place on an axis, and Lagrange's weights of them. */
  const around = (axis, x) => {
    const step = (axis.at(-1) - axis[0]) / (axis.length - 1);
    const at = Math.min(Math.max((x - axis[0]) / step, 0), axis.length - 1);
    const first = Math.min(Math.max(Math.floor(at) - 1, 0), axis.length - 4);
    const four = [0, 1, 2, 3];
    const weights = four.map((i) => four.reduce((p, j) => (j === i ? p : (p * (at - first - j)) / (i - j)), 1));
    const low = Math.min(Math.floor(at), axis.length - 2);
    return { nodes: four.map((i) => first + i), weights, linear: { nodes: [low, low + 1], weights: [low + 1 - at, at - low] } };
  };
  const sum = (values, width, a, b) => {
    let total = 0;
    for (const [i, n] of a.nodes.entries())
      for (const [j, d] of b.nodes.entries()) {
        const value = values[n * width + d];
        if (value === null) return NaN;
        total += a.weights[i] * b.weights[j] * value;
      }
    return total;
  };
  /** A field over a grid at (ln N, ln D): cubic, linear where a neighbour is not known. */
  const at = (grid, values, x, y) => {
    if (!values) return NaN;
    const [a, b] = [around(grid.axes[0], x), around(grid.axes[1], y)];
    const value = sum(values, grid.axes[1].length, a, b);
    return Number.isNaN(value) ? sum(values, grid.axes[1].length, a.linear, b.linear) : value;
  };
  const covers = (grid, x, y) =>
    [x, y].every((v, k) => v >= grid.axes[k][0] - 1e-9 && v <= grid.axes[k].at(-1) + 1e-9);

  const find = (architecture, routing, group) => {
    const own = data.entries.filter((e) => e.architecture === architecture);
    const grouped = own.filter((e) => e.group === group);
    const some = grouped.length ? grouped : own;
    return some.find((e) => `${e.experts}/${e.top_k}` === routing) ?? some[0];
  };

  /** The batch as 4, 5, 6 or 7 times a power of two sequences: (tokens, sequences). */
  const usable = (tokens, length, asRun) => {
    if (!Number.isFinite(tokens)) return [NaN, null];
    if (!length) return [asRun ? Math.round(tokens) : Number(tokens.toPrecision(2)), null];
    const wanted = Math.max(tokens / length, 1);
    if (asRun) return [Math.round(wanted) * length, Math.round(wanted)];
    const quarter = Math.max(1, 2 ** (Math.floor(Math.log2(wanted)) - 2));
    const off = (k) => Math.abs(Math.log((k * quarter) / wanted));
    const best = [1, 2, 3, 4, 5, 6, 7, 8].reduce((b, k) => (off(k) < off(b) ? k : b));
    return [best * quarter * length, best * quarter];
  };

  const FIELDS = ["rate", "rate_half", "batch", "batch_half", "loss", "loss_low", "loss_high", "flops"];
  /** What the fitted object answers for a run; `within` is a place in data.within. */
  const ask = (entry, params, tokens, within) => {
    const [x, y] = [Math.log(params), Math.log(tokens)];
    if (!covers(entry.grid, x, y)) return null;
    const off = (p) => Math.max(Math.abs(p.params - x), Math.abs(p.tokens - y));
    const near = entry.exact.filter((p) => off(p) < p.within).sort((p, q) => off(p) - off(q))[0];
    const told = Object.fromEntries(FIELDS.map((f) => [f, near ? (near[f] ?? NaN) : at(entry.grid, entry.grid.fields[f], x, y)]));
    const between = (middle, half) => [Math.exp(middle - half), Math.exp(middle + half)];
    const warnings = [...entry.warnings];
    let rate = Math.exp(told.rate);
    if (rate > 1) { rate = NaN; warnings.push("the learning rate would be above 1"); }
    const [batch, sequences] = usable(Math.exp(told.batch), entry.sequence_length, entry.batch_as_run);
    const spread = between(told.batch, told.batch_half);
    if (entry.sequence_length && Math.exp(told.batch) < entry.sequence_length) warnings.push(`the best batch would be smaller than one sequence of ${entry.sequence_length} tokens`);
    const most = at(entry.coarse, entry.coarse.fields[`most${within}`], x, y);
    const mostRate = at(entry.coarse, entry.coarse.fields[`most_rate${within}`], x, y);
    const sizes = { N: params, D: tokens, FLOPs: Math.exp(told.flops) };
    const factors = Object.entries(entry.ranges).map(([axis, [low, high]]) => [axis, sizes[axis] / Math.min(Math.max(sizes[axis], low), high)]);
    const outside = Math.max(...factors.filter(([a]) => a !== "FLOPs").map(([, f]) => Math.max(f, 1 / f)));
    const side = (word, size) => {
      const own = factors.filter(([, f]) => size(f) > 1.0005).map(([axis, f]) => `${kit.short(size(f))}× in ${axis}`);
      return own.length ? [`${word} the cells by ${own.join(", ")}`] : [];
    };
    const width = entry.grid.axes[1].length;
    const nearest = (axis, v) => Math.round(((v - axis[0]) / (axis.at(-1) - axis[0])) * (axis.length - 1));
    const code = entry.grid.directions_at[nearest(entry.grid.axes[0], x) * width + nearest(entry.grid.axes[1], y)];
    const directions = near?.cell ? "" : (entry.grid.directions[code] ?? "");
    return {
      entry, params, tokens, rate, rate_interval: between(told.rate, told.rate_half), batch, sequences,
      batch_exact: Math.exp(told.batch), batch_interval: [Math.min(spread[0], batch), Math.max(spread[1], batch)], loss: Math.exp(told.loss),
      loss_interval: [Math.exp(told.loss_low), Math.exp(told.loss_high)], most: Math.exp(told.batch + most),
      most_rate: Math.exp(told.rate + mostRate), flops: sizes.FLOPs, total: Math.exp(at(entry.grid, entry.grid.fields.total, x, y)),
      cell: near?.cell ?? "", verdict: entry.verdict ?? (outside <= data.near ? data.words.inside : data.words.extrapolated),
      reach: [...side("beyond", (f) => f), ...side("below", (f) => 1 / f)].join("; "),
      long: factors.some(([axis, f]) => Math.max(f, 1 / f) > data.long[axis]), directions, warnings,
      published: entry.coarse.published.map((law) => ({
        source: law.source + (law.verified ? "" : " (unverified)"),
        rate: Math.exp(at(entry.coarse, law.rate, x, y)), batch: Math.exp(at(entry.coarse, law.batch, x, y)),
      })).filter((law) => Number.isFinite(law.rate) || Number.isFinite(law.batch)),
    };
  };
  return { data, find, ask, at, covers };
})();

// The form, the table of architectures and the charts.
(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const { make, draw, styles, short, ticks } = kit;
  const page = kit.read("data-page");
  const field = (name) => form.elements[name];
  const outs = (name) => document.querySelectorAll(`[data-out="${name}"]`);
  const say = (name, text) => { for (const element of outs(name)) element.textContent = text; };
  const write = (value, style) => (Number.isFinite(value) ? styles[style](value) : "–");
  const span = ([low, high], style) => (Number.isFinite(low + high) ? `${styles[style](low)} to ${styles[style](high)}` : "no interval");
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");

  /** A number as people write it: 7e9, 7B, 1.4T, 1,400,000; or why it is none. */
  const read = (text, name) => {
    const plain = text.trim();
    const comma = /^([-+]?[0-9]+),([0-9]+) ?([kmbt]?)$/i.exec(plain);
    if (comma && (comma[3] || comma[2].length !== 3)) return `${name}: write ${comma[1]}.${comma[2]}${comma[3]}`;
    const value = kit.amount(plain);
    if (!(value > 0 && Number.isFinite(value))) return `${name} must be a number above zero, such as ${name === "Tokens" ? "1.4T" : "7B"}`;
    return value < 1000 ? `${name} ${plain}: did you mean ${plain}${name === "Tokens" ? "T" : "B"}?` : value;
  };

  const options = (name, values, words, keep) => {
    const select = field(name), was = select.value || keep;
    select.replaceChildren(...values.map((v, i) => { const o = make("option", words[i]); o.value = v; return o; }));
    if (values.includes(was)) select.value = was;
    select.parentNode.hidden = values.length < 2;
  };
  const preferred = Object.fromEntries(answers.data.entries.map((e) => [e.architecture, e.group]));
  for (const entry of [...answers.data.entries].reverse())
    if (entry.exact.some((p) => !p.cell)) preferred[entry.architecture] = entry.group;
  const choices = () => {
    const own = answers.data.entries.filter((e) => e.architecture === field("architecture").value);
    const groups = [...new Set(own.map((e) => e.group))];
    options("group", groups, groups, preferred[field("architecture").value]);
    const routed = own.filter((e) => e.group === groups[0]);
    options("routing", routed.map((e) => `${e.experts}/${e.top_k}`),
      routed.map((e) => `${e.experts}, top-${e.top_k}${e.foreign ? " (not in the cells)" : ""}`), "");
  };

  let shown = null;
  const copies = {
    link: () => address.link(),
    command: (a) => {
      const text = (word) => (/^[\w./:@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
      const parts = ["raysweep recommend", text(page.results), "--params", a.params, "--tokens", a.tokens, "--architecture", text(a.entry.architecture)];
      if (a.entry.experts > 1) parts.push("--experts", a.entry.experts, "--top-k", a.entry.top_k);
      if (a.entry.group) parts.push("--of", text(a.entry.group));
      parts.push(...page.options.map(text));
      return parts.join(" ");
    },
    json: (a) => JSON.stringify(plain(a), null, 2),
    yaml: (a) => Object.entries(plain(a)).map(([k, v]) => `${k}: ${Array.isArray(v) ? `[${v.join(", ")}]` : typeof v === "string" ? JSON.stringify(v) : v}`).join("\n"),
  };
  const plain = (a) => {
    const number = (v) => (Number.isFinite(v) ? Number(v.toPrecision(5)) : null);
    const said = {
      architecture: a.entry.architecture, params: a.params, tokens: a.tokens, experts: a.entry.experts, top_k: a.entry.top_k,
      learning_rate: number(Number(a.rate.toPrecision(3))), learning_rate_interval: a.rate_interval.map(number),
      batch_tokens: number(a.batch), batch_tokens_interval: a.batch_interval.map(number), batch_sequences: a.sequences,
      loss: number(a.loss), loss_interval: a.loss_interval.map(number), verdict: a.verdict,
    };
    if (a.entry.group) said.group = a.entry.group;
    return said;
  };
  for (const button of document.querySelectorAll("[data-copy]"))
    button.addEventListener("click", async () => {
      if (!shown) return;
      const text = copies[button.dataset.copy](shown);
      try { await navigator.clipboard.writeText(text); } catch {
        const area = make("textarea");
        area.value = text;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
      }
      say("copied", " copied");
      setTimeout(() => say("copied", ""), 1500);
    });

  // --- charts: along compute at the asked tokens a parameter ------------------------------------
  const QUANTITIES = [["rate", "learning rate", "rate"], ["batch", "batch, tokens", "batch"], ["loss", "loss", "loss"]];
  const halves = { rate: "rate_half", batch: "batch_half" };
  const ends = (entry, name, x, y) => {
    const grid = entry.grid, told = (f) => answers.at(grid, grid.fields[f], x, y);
    const middle = told(name);
    return name === "loss" ? [middle, told("loss_low"), told("loss_high")] : [middle, middle - told(halves[name]), middle + told(halves[name])];
  };
  const path = (a) => {
    const ratio = Math.log(a.tokens / a.params), entry = a.entry, points = [];
    const flops = entry.exact.map((p) => p.flops).concat(Math.log(a.flops));
    const low = Math.min(...flops) - 0.4, high = Math.max(...flops) + 0.4;
    for (let i = 0; i <= 60; i++) {
      const x = (low + ((high - low) * i) / 60 - Math.log(6) - ratio) / 2;
      if (answers.covers(entry.grid, x, x + ratio)) points.push({ x, y: x + ratio, flops: answers.at(entry.grid, entry.grid.fields.flops, x, x + ratio) });
    }
    return points;
  };
  const read_at = (points, values, flops) => {
    const k = points.findIndex((p) => p.flops >= flops);
    if (k <= 0) return k === 0 && points[0].flops - flops < 0.5 ? values[0] : NaN;
    const t = (flops - points[k - 1].flops) / (points[k].flops - points[k - 1].flops);
    return values[k - 1] + t * (values[k] - values[k - 1]);
  };
  const chart = (a, points, [name, label, style], last) => {
    const colour = `var(--${page.colours[a.entry.architecture]})`;
    const law = points.map((p) => ends(a.entry, name, p.x, p.y));
    if (law.length < 2 || !law.every((v) => Number.isFinite(v[0]))) return null;
    const own = { rate: Math.log(a.rate), batch: Math.log(a.batch_exact), loss: Math.log(a.loss) }[name];
    const middle = law.map((v) => v[0]);
    const dots = a.entry.exact.filter((p) => p.cell && Number.isFinite(p[name] ?? NaN)).map((p) => {
      const moved = p[name] - ends(a.entry, name, p.params, p.tokens)[0] + read_at(points, middle, p.flops);
      return { x: p.flops, y: moved, text: `${p.cell}: ${label.split(",")[0]} ${styles[style](Math.exp(p[name]))}` };
    }).filter((p) => Number.isFinite(p.y));
    const said = a.published.map((p) => ({ source: p.source, y: Math.log(p[name] ?? NaN) })).filter((p) => Number.isFinite(p.y));
    const core = [...middle, own, ...dots.map((p) => p.y)].filter(Number.isFinite);
    let [low, high] = [Math.min(...core), Math.max(...core)];
    const reach = name === "loss" ? 0 : Math.max(1.5, (high - low) * 0.6);
    const near = said.filter((p) => p.y > low - reach && p.y < high + reach);
    [low, high] = [Math.min(low, ...near.map((p) => p.y)), Math.max(high, ...near.map((p) => p.y))];
    const margin = 0.08 * (high - low) + 0.004;
    low -= margin; high += margin;
    const [W, H, L, T] = [Math.max(280, document.getElementById("ask-charts").clientWidth || 470), last ? 156 : 126, 62, 18], bottom = last ? 38 : 8;
    const [from, to] = [points[0].flops, points.at(-1).flops];
    const px = (v) => L + ((W - L - 10) * (v - from)) / (to - from), py = (v) => T + (H - T - bottom) * (1 - (v - low) / (high - low));
    const svg = draw(null, "svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${label} against training FLOPs` });
    const clip = draw(draw(svg, "clipPath", { id: `clip-${name}` }), "rect", { x: L, y: T, width: W - L - 10, height: H - T - bottom });
    clip.setAttribute("rx", 0);
    draw(svg, "text", { x: 0, y: 11, class: "title" }, label);
    for (const v of ticks(low, high, 4)) {
      draw(svg, "line", { x1: L, x2: W - 10, y1: py(Math.log(v)), y2: py(Math.log(v)), stroke: "var(--grid)" });
      draw(svg, "text", { x: L - 6, y: py(Math.log(v)) + 4, "text-anchor": "end" }, name === "loss" ? String(Number(v.toPrecision(4))) : name === "rate" ? kit.scientific(v) : short(v));
    }
    for (const v of ticks(from, to, 5)) {
      draw(svg, "line", { x1: px(Math.log(v)), x2: px(Math.log(v)), y1: T, y2: H - bottom, stroke: "var(--grid)" });
      if (last) draw(svg, "text", { x: px(Math.log(v)), y: H - bottom + 15, "text-anchor": "middle" }, kit.scientific(v));
    }
    if (last) draw(svg, "text", { x: (L + W) / 2, y: H - 4, "text-anchor": "middle" }, "training FLOPs");
    const inside = draw(svg, "g", { "clip-path": `url(#clip-${name})` });
    const line = (k) => points.map((p, i) => [px(p.flops), py(Math.min(Math.max(law[i][k], low - 9), high + 9))]);
    if (law.every((v) => Number.isFinite(v[1] + v[2])))
      draw(inside, "polygon", { points: [...line(1), ...line(2).reverse()].map((p) => p.map((v) => v.toFixed(1)).join()).join(" "), fill: colour, opacity: 0.13 });
    draw(inside, "polyline", { points: line(0).map((p) => p.map((v) => v.toFixed(1)).join()).join(" "), fill: "none", stroke: colour, "stroke-width": 1.8 });
    const at = px(Math.log(a.flops));
    for (const p of near) {
      const mark = draw(inside, "path", { d: `M${at - 4} ${py(p.y)}h8`, stroke: "var(--faint)", "stroke-width": 2.4 });
      draw(mark, "title", {}, `${p.source}: ${styles[style](Math.exp(p.y))}`);
    }
    for (const p of dots) draw(draw(inside, "circle", { cx: px(p.x), cy: py(p.y), r: 3.6, fill: colour, stroke: "var(--paper)" }), "title", {}, p.text);
    if (Number.isFinite(own)) {
      const interval = { rate: a.rate_interval, batch: a.batch_interval, loss: a.loss_interval }[name].map((v) => py(Math.min(Math.max(Math.log(v), low - 1), high + 1)));
      if (interval.every(Number.isFinite)) draw(inside, "line", { x1: at, x2: at, y1: interval[0], y2: interval[1], stroke: colour, "stroke-width": 1.5 });
      const star = Array.from({ length: 10 }, (_, i) => { const r = i % 2 ? 3.4 : 8; const t = (Math.PI * i) / 5; return `${(at + r * Math.sin(t)).toFixed(1)},${(py(own) - r * Math.cos(t)).toFixed(1)}`; });
      draw(draw(inside, "polygon", { points: star.join(" "), fill: colour, stroke: "var(--paper)" }), "title", {}, `this run: ${styles[style](Math.exp(own))}`);
    }
    return svg;
  };
  const charts = (a) => {
    const points = path(a);
    const some = QUANTITIES.filter(([name]) => a.entry.grid.fields[name]?.some((v) => v !== null));
    const drawn = some.map((q, i) => chart(a, points, q, i === some.length - 1)).filter(Boolean);
    document.getElementById("ask-charts").replaceChildren(...drawn);
    document.getElementById("ask-key").hidden = !drawn.length;
    say("ratio", `line: the law at ${short(a.tokens / a.params)} tokens a parameter, 95 %`);
  };

  // --- the rest ----------------------------------------------------------------------------------
  const batchSpan = (a) => (a.entry.batch_as_run ? "as run" : span(a.batch_interval, "batch"));
  const beside = (params, tokens, within) => {
    say("side_params", short(params));
    say("side_tokens", short(tokens));
    for (const row of document.querySelectorAll("[data-side]")) {
      const name = row.dataset.side, same = name === field("architecture").value;
      const entry = answers.find(name, same ? field("routing").value : "", same ? field("group").value : preferred[name]);
      const a = entry && answers.ask(entry, params, tokens, within);
      const put = (key, text) => { row.querySelector(`[data-side-out="${key}"]`).textContent = text; };
      put("experts", entry?.experts > 1 ? `${entry.experts} experts, top-${entry.top_k}` : "");
      put("learning_rate", a ? write(a.rate, "rate") : "–");
      put("rate_interval", a ? span(a.rate_interval, "rate") : "");
      put("batch_tokens", a ? write(a.batch, "batch") : "–");
      put("batch_interval", a ? batchSpan(a) : "");
      put("loss", a ? write(a.loss, "loss") : "–");
      put("loss_interval", a ? span(a.loss_interval, "loss") : "");
      put("total", a ? write(a.total, "params") : "–");
      put("flops", a ? write(a.flops, "flops") : "–");
      put("verdict", a ? a.verdict : "outside the grid of this page");
    }
  };
  const show = (a) => {
    say("learning_rate", write(a.rate, "rate"));
    say("rate_interval", Number.isFinite(a.rate) ? `95 %: ${span(a.rate_interval, "rate")}` : "");
    say("batch_tokens", write(a.batch, "batch"));
    say("sequences", a.sequences ? `${a.sequences} sequences of ${a.entry.sequence_length}; ` : "");
    say("batch_interval", `${a.entry.batch_as_run ? "" : "95 %: "}${batchSpan(a)}`);
    say("loss", write(a.loss, "loss"));
    say("loss_interval", Number.isFinite(a.loss) ? `95 %: ${span(a.loss_interval, "loss")}` : "");
    say("most", write(a.most, "batch"));
    say("most_rate", Number.isFinite(a.most) ? `, at rate ${write(a.most_rate, "rate")}` : "");
    say("verdict", a.verdict + (a.reach ? `: ${a.reach}` : "") + (a.cell ? ` (the cell ${a.cell})` : ""));
    for (const element of outs("verdict")) element.classList.toggle("bad", a.long || Boolean(a.entry.verdict));
    const said = a.directions ? [`the cells do not tell the effect of ${a.directions}: there the answer follows published laws`] : [];
    for (const element of outs("limits")) element.replaceChildren(...[...said, ...a.warnings].map((t) => make("li", sentence(t))));
    for (const element of outs("published")) element.replaceChildren(...a.published.map((law) => {
      const row = make("tr");
      row.append(make("td", law.source), make("td", write(law.rate, "rate"), "num"), make("td", write(law.batch, "batch"), "num"));
      return row;
    }));
    charts(a);
  };
  const update = () => {
    const params = read(field("params").value, "Active parameters"), tokens = read(field("tokens").value, "Tokens");
    const entry = answers.find(field("architecture").value, field("routing").value, field("group").value);
    const within = Number(form.elements.within?.value ?? 0);
    let problem = [params, tokens].find((v) => typeof v === "string") ?? "";
    shown = problem ? null : answers.ask(entry, params, tokens, within);
    if (!problem && !shown) problem = "Outside the grid of this page: raysweep recommend answers, as far as anything can";
    const notice = document.getElementById("ask-problem");
    notice.textContent = problem && sentence(problem).replace("?.", "?");
    notice.hidden = !problem;
    document.getElementById("ask-answer").hidden = Boolean(problem);
    if (problem) return;
    show(shown);
    beside(params, tokens, within);
  };
  const KEYS = [["N", "params"], ["D", "tokens"], ["a", "architecture"], ["e", "routing"], ["g", "group"], ["w", "within"]];
  const asked = () => KEYS.map(([key, name]) => [key, field(name)]).filter(([key, f]) => f?.value && !(key === "e" && f.value.startsWith("1/")));
  const fill = (given) => {
    for (const [key, name] of KEYS.filter(([key]) => "NDaw".includes(key)))
      if (given.get(key) && field(name)) field(name).value = given.get(key);
    if (!field("architecture").value) field("architecture").selectedIndex = 0;
    choices();
    for (const [key, name] of KEYS.filter(([key]) => "eg".includes(key)))
      if (given.get(key) && [...field(name).options].some((o) => o.value === given.get(key))) field(name).value = given.get(key);
  };
  let drawn_for = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (drawn_for && Math.abs(contentRect.width - drawn_for) > 1 && shown) charts(shown);
    drawn_for = contentRect.width;
  }).observe(document.getElementById("ask-charts"));
  for (const part of [form, field("within")]) // the latter stands outside of the form
    part?.addEventListener("input", ({ target }) => {
      if (target.name === "architecture") { field("group").value = ""; choices(); }
      update();
      address.changed(target.name);
    });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const chip of document.querySelectorAll("[data-ask]"))
    chip.addEventListener("click", () => {
      const [n, d, a] = chip.dataset.ask.split("|");
      fill(new URLSearchParams({ N: n, D: d, a }));
      update();
      address.changed("chip");
    });
  fill(new URLSearchParams());
  const came = asked().map(([key, f]) => [key, f.value]);
  const same = () => asked().map(([key, f]) => [key, f.value]).join() === came.join();
  address.add({
    tell: (all, whole) => {
      if (whole || !same()) for (const [key, f] of asked()) if (key !== "w" || whole || f.value !== came.find(([k]) => k === key)[1]) all.set(key, f.value.trim());
    },
    take: (given) => {
      fill(new URLSearchParams(came));
      fill(given);
      update();
    },
  });
})();
