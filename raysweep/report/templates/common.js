// What the scripts of the page share: reading its data, writing numbers as text.py does, SVG.
const kit = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const draw = (parent, tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, v] of Object.entries(attributes)) element.setAttribute(name, v);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const significant = (value, digits) => trim(Number(value).toPrecision(digits));
  const full = (value, digits) => Number(value).toPrecision(digits).replace(/\.$/, "");
  const short = (value, digits = 3, write = significant) => {
    for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= limit * (1 - 0.5 * 10 ** -digits)) return write(value / limit, digits) + letter;
    return Math.abs(value) < 1e-3 && value ? value.toExponential(digits - 1).replace("e+", "e") : write(value, digits);
  };
  const scientific = (value, digits = 3, write = significant) => {
    if (value === 0 || (Math.abs(value) >= 1e-2 && Math.abs(value) < 1e3)) return write(value, digits);
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${write === full ? mantissa : trim(mantissa)}e${Number(exponent)}`;
  };
  const styles = {
    rate: (v) => scientific(v, 3, full), batch: (v) => short(v, 3, full), tokens: (v) => short(v), params: (v) => short(v),
    flops: (v) => scientific(v), loss: (v) => v.toFixed(4), count: String,
    percent: (v) => `${(100 * v).toFixed(2)} %`, seconds: (v) => significant(v, 3), text: String, key: String,
  };
  /** A number as people write it: 7e9, 7B, 1.4T, 1,400,000; NaN where it is none. */
  const amount = (text) => {
    const match = /^([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[0-9]{1,3}(?:[,_ ][0-9]{3})+)(e[+-]?[0-9]+)? ?([kmbt]?)$/i.exec(text.trim());
    return match ? Number(match[1].replaceAll(/[,_ ]/g, "") + (match[2] ?? "")) * { "": 1, k: 1e3, m: 1e6, b: 1e9, t: 1e12 }[match[3].toLowerCase()] : NaN;
  };

  const exact = (value) => (value >= 1e3 ? short(value, 4) : String(Number(value.toPrecision(4)))); // as `amount` reads it

  /** A few round numbers between two ends, given as their logarithms: what stands beside an axis. */
  const ticks = (low, high, most) => {
    const decades = [];
    for (let p = Math.floor(low / Math.LN10); p <= Math.ceil(high / Math.LN10); p++) decades.push(p);
    const within = (steps) => decades.flatMap((p) => steps.map((s) => s * 10 ** p)).filter((v) => Math.log(v) >= low && Math.log(v) <= high);
    if (high - low < Math.log(3)) {
      const [a, b] = [Math.exp(low), Math.exp(high)];
      const step = [1, 2, 5, 10].map((s) => s * 10 ** Math.floor(Math.log10((b - a) / most))).find((s) => (b - a) / s <= most);
      return Array.from({ length: most + 2 }, (_, i) => (Math.floor(a / step) + i) * step).filter((v) => v >= a && v <= b).map((v) => Number(v.toPrecision(6)));
    }
    const whole = within([1]);
    if (whole.length > most) return whole.filter((_, i) => i % Math.ceil(whole.length / most) === 0);
    return [[1, 2, 5], [1, 3]].map(within).find((t) => t.length <= most) ?? whole;
  };
  /** A round number beside an axis. */
  const tick = (value, style) =>
    ["rate", "flops", "coefficient"].includes(style) ? scientific(value) : ["loss", "number"].includes(style) ? significant(value, 6) : short(value);

  /** What stands packed in the page (gzip in base64), as text. */
  const unpack = async (id) => {
    const packed = atob(document.getElementById(id).textContent.trim());
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  let figures = null;
  const figure = async (name) => (await (figures ??= unpack("figures").then(JSON.parse)))[name];

  const quoted = (v) => {
    if (v === null || v === undefined) return "";
    if (typeof v === "string" && /^[=+\-@\t\r]/.test(v)) v = `'${v}`; // no formula
    return /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v;
  };
  // Data to download beside those of figures: name -> function that gives the text.
  const csv = { text: (rows) => rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n" };
  return { read, make, unpack, figure, draw, styles, short, scientific, significant, amount, exact, ticks, tick, csv };
})();
