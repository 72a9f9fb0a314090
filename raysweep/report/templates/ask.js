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
    const match = /^([0-9.]+(?:e[+-]?[0-9]+)?)([kmbt]?)$/i.exec(text.replaceAll(/[\s,_]/g, ""));
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

  const reach = (factors) => {
    const far = Object.entries(factors).filter(([, f]) => f !== 1);
    if (!far.length) return "Inside the range of the cells.";
    return far.map(([name, f]) => `${short(f > 1 ? f : 1 / f)}× ${f > 1 ? "beyond" : "below"} the cells in ${name}`).join(", ") + ".";
  };

  const limits = (answer) => {
    const said = [];
    if (answer.foreign) said.push(`No cell has ${answer.experts} experts and top-${answer.top_k}: this rests on how other numbers of experts behave.`);
    for (const [side, word] of [[answer.rate, "learning rate"], [answer.batch, "batch"]]) {
      if (!side) said.push(`No law of the ${word} could be fitted.`);
      else said.push(`${word[0].toUpperCase()}${word.slice(1)} by ${side.formula}, on ${side.cells} cells` + (side.left_out ? `; ${side.left_out} left out.` : "."));
    }
    if (!Number.isFinite(answer.loss.value)) said.push("No law of the loss can tell this run's.");
    else said.push(`Loss by ${answer.loss.formula}, on ${answer.loss.cells} cells` + (answer.loss.status === "at bound" ? "; a coefficient lies at its bound." : "."));
    return said;
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
    out("reach").textContent = reach(answer.extrapolation);
    out("reach").classList.toggle("bad", answer.extrapolation.FLOPs > data.far);
    out("limits").replaceChildren(...limits(answer).map((text) => make("li", text)));
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
