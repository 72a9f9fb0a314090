// The calculator's form: reads what is typed, writes what `recommend` answers.
(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const { read, make, styles, short } = kit;
  const data = read("data-calculator");
  const out = (name) => document.querySelector(`#ask-answer [data-out="${name}"]`);
  const field = (name) => form.elements[name];

  /** A number as people type it: 7e9, 7B, 1.4T, 20 000. */
  const parse = (text) => {
    const match = /^([0-9.]+(?:e[+-]?[0-9]+)?)([kmbt]?)$/i.exec(text.replaceAll(/[\s_]|,(?=[0-9]{3}(?![0-9]|[kmbt]))/gi, ""));
    return match ? Number(match[1]) * { "": 1, k: 1e3, m: 1e6, b: 1e9, t: 1e12 }[match[2].toLowerCase()] : NaN;
  };
  const write = (value, style) => (Number.isFinite(value) ? styles[style](value) : "–");
  const interval = (side, style) =>
    side && Number.isFinite(side.low) ? `95 %: ${styles[style](side.low)} to ${styles[style](side.high)}` : "no interval";

  const routing = () => {
    const group = data.groups[field("architecture").value];
    const moe = group.kind !== "dense";
    for (const label of form.querySelectorAll(".moe")) label.hidden = !moe;
    [field("experts").value, field("top_k").value] = moe ? group.pairs[0] : ["", ""];
  };
  const whole = (name) => (field(name).value.trim() === "" ? undefined : parse(field(name).value));

  const sentence = (text) => {
    const plain = text.trim().replaceAll("learning_rate", "learning rate").replaceAll("batch_tokens", "batch");
    return plain.charAt(0).toUpperCase() + plain.slice(1) + (plain.endsWith(".") ? "" : ".");
  };
  const reach = (answer) => {
    const said = recommend.reach(data, answer.extrapolation, (f) => `${short(f)}×`) || data.words.inside;
    return sentence(answer.far ? recommend.fill(data.words.far, { reach: said }) : said);
  };
  /** What the cards say of an answer; how far it extrapolates stands above the list already. */
  const limits = (answer) => {
    const long = data.words.far.split("{")[0];
    const said = answer.warnings.filter((text) => !text.startsWith(long)).map(sentence);
    if (Number.isFinite(answer.loss.value) && !Number.isFinite(answer.loss.low)) said.push(data.words.no_interval);
    return said;
  };
  const restsOn = (answer) => {
    const sides = [answer.rate, answer.batch, answer.loss].filter((side) => side?.formula);
    return sides.length ? `Rests on ${[...new Set(sides.map((s) => `${s.formula} (${s.cells} cells)`))].join("; ")}.` : "";
  };

  const update = () => {
    const params = parse(field("params").value), tokens = parse(field("tokens").value);
    const experts = whole("experts"), topK = whole("top_k");
    const good = (n) => n === undefined || (Number.isInteger(n) && n >= 1);
    let problem = "";
    if (!(params > 0 && Number.isFinite(params))) problem = "Active parameters must be a number above zero, such as 7B or 7e9.";
    else if (!(tokens > 0 && Number.isFinite(tokens))) problem = "Tokens must be a number above zero, such as 1.4T or 1.4e12.";
    else if (!good(experts) || !good(topK)) problem = "Experts and top-k must be whole numbers from 1.";
    else if (experts !== undefined && topK !== undefined && topK > experts) problem = `Top-${topK} of ${experts} experts cannot be.`;
    const notice = document.getElementById("ask-problem");
    notice.textContent = problem;
    notice.hidden = !problem;
    document.getElementById("ask-answer").hidden = Boolean(problem);
    if (problem) return;

    const answer = recommend(data, field("architecture").value, params, tokens, experts, topK);
    out("learning_rate").textContent = write(answer.learning_rate, "rate");
    out("batch_tokens").textContent = write(answer.batch_tokens, "batch");
    out("loss").textContent = write(answer.loss.value, "loss");
    out("rate_interval").textContent = interval(answer.rate, "rate");
    out("batch_interval").textContent = interval(answer.batch, "batch");
    out("loss_interval").textContent = interval(answer.loss, "loss");
    out("sequences").textContent = answer.batch_sequences ? `${answer.batch_sequences} sequences of ${answer.sequence_length}` : "";
    out("reach").textContent = reach(answer);
    out("reach").classList.toggle("bad", answer.far);
    out("limits").replaceChildren(...limits(answer).map((text) => make("li", text)));
    out("rests_on").textContent = restsOn(answer);
    out("published").replaceChildren(...answer.published.map((law) => {
      const row = make("tr");
      row.append(make("td", law.source + (law.verified ? "" : " (unverified)")),
        make("td", write(law.learning_rate ?? NaN, "rate"), "num"), make("td", write(law.batch_tokens ?? NaN, "batch"), "num"));
      return row;
    }));
  };
  form.addEventListener("input", (event) => {
    if (event.target.name === "architecture") routing();
    update();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  routing();
  update();
})();
