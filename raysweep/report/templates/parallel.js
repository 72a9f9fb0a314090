// Parallel axes of all trials. Not Plotly's: those need WebGL and the right to make code from text.
/** Draws into `place`; `keep(k, [low, high] or null)` is called when a range of axis k is dragged. */
const parallel = (place, { axes, colours, shown, keep }) => {
  const { draw } = kit;
  const T = 26, B = 8, H = 190, LEFT = 22, RIGHT = 22, GRIP = 13;
  const scales = axes.map(({ values }) => {
    const known = values.filter((v) => v > 0).map(Math.log);
    const low = Math.min(...known), high = Math.max(...known), margin = 0.02 * (high - low) || 0.05;
    return { low: low - margin, high: high + margin };
  });
  const y = (k, v) => T + (H - T - B) * (1 - (Math.log(v) - scales[k].low) / (scales[k].high - scales[k].low));
  const back = (k, place) => Math.exp(scales[k].low + (1 - (place - T) / (H - T - B)) * (scales[k].high - scales[k].low));
  const roles = Array.from({ length: shown }, (_, row) => colours(row));
  const kinds = [...new Set(roles)];
  let svg = null, paths = {}, brushes = [], kept = null, limits = [], width = 0;

  const x = (k) => LEFT + ((width - LEFT - RIGHT) * k) / (axes.length - 1);
  const through = (rows) => rows.map((row) => {
    const points = axes.map(({ values }, k) => (values[row] > 0 ? `${x(k).toFixed(1)} ${y(k, values[row]).toFixed(1)}` : null));
    return points.some((p) => p === null) ? "" : `M${points.join("L")}`;
  }).join("");
  const lines = () => {
    const inside = new Set(kept ?? Array.from({ length: shown }, (_, row) => row));
    for (const role of kinds) {
      const own = roles.flatMap((r, row) => (r === role ? [row] : []));
      paths[role].setAttribute("d", through(own.filter((row) => inside.has(row))));
      paths[`not ${role}`].setAttribute("d", through(own.filter((row) => !inside.has(row))));
    }
    limits.forEach(([low, high], k) => {
      const free = low === -Infinity && high === Infinity;
      const [top, bottom] = [Math.max(T, Math.min(H - B, high === Infinity ? T : y(k, high))), Math.max(T, Math.min(H - B, low > 0 ? y(k, low) : H - B))];
      brushes[k].setAttribute("y", top);
      brushes[k].setAttribute("height", free ? 0 : Math.max(2, bottom - top));
    });
  };
  const grip = (k, target) => {
    let from = null;
    const at = (event) => Math.max(T, Math.min(H - B, ((event.clientY - svg.getBoundingClientRect().top) * H) / svg.getBoundingClientRect().height));
    const range = (event) => [from, at(event)].sort((a, b) => b - a).map((place) => back(k, place));
    target.addEventListener("pointerdown", (event) => { from = at(event); target.setPointerCapture(event.pointerId); });
    target.addEventListener("pointermove", (event) => { if (from !== null && Math.abs(at(event) - from) > 3) keep(k, range(event)); });
    target.addEventListener("pointerup", (event) => {
      if (from !== null) keep(k, Math.abs(at(event) - from) > 3 ? range(event) : null);
      from = null;
    });
  };
  const build = () => {
    width = place.clientWidth;
    if (!width) return;
    svg = draw(null, "svg", { viewBox: `0 0 ${width} ${H}`, width, height: H, role: "img", "aria-label": "Every trial across its size, setting and loss; the fields above narrow the same ranges" });
    for (const role of kinds) paths[`not ${role}`] = draw(svg, "path", { fill: "none", stroke: "var(--faint)", "stroke-width": 0.6, opacity: 0.25 });
    for (const role of kinds) paths[role] = draw(svg, "path", { fill: "none", stroke: `var(--${role})`, "stroke-width": shown > 400 ? 0.6 : 1, opacity: shown > 400 ? 0.35 : 0.6 });
    brushes = axes.map(({ label, style }, k) => {
      draw(svg, "line", { x1: x(k), x2: x(k), y1: T, y2: H - B, stroke: "var(--muted)" });
      draw(svg, "text", { x: x(k), y: 11, "text-anchor": k ? (k === axes.length - 1 ? "end" : "middle") : "start", dx: k ? (k === axes.length - 1 ? RIGHT - 2 : 0) : 2 - LEFT, class: "title" }, label);
      const { low, high } = scales[k];
      for (const v of kit.ticks(low, high, 4))
        draw(svg, "text", { x: x(k) + (k === axes.length - 1 ? -5 : 5), "text-anchor": k === axes.length - 1 ? "end" : "start", y: y(k, v) + 4, class: "on-lines" }, kit.tick(v, style));
      const brush = draw(svg, "rect", { x: x(k) - 6, width: 12, y: T, height: 0, fill: "var(--ink)", opacity: 0.2 });
      grip(k, draw(svg, "rect", { x: x(k) - GRIP, width: 2 * GRIP, y: T - 4, height: H - T - B + 8, fill: "transparent", class: "grip", "data-axis": k }));
      return brush;
    });
    place.replaceChildren(svg);
    lines();
  };
  build();
  new ResizeObserver(() => { if (place.clientWidth !== width) build(); }).observe(place);
  return {
    show: (rows, ends) => {
      kept = rows;
      limits = ends;
      if (svg) lines();
    },
  };
};
