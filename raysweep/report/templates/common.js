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
  const csv = {}; // further data to download: name -> function that gives the text
  return { read, make, draw, styles, short, scientific, csv };
})();
