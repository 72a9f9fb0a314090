// The calculator: the same arithmetic as Fits.recommend, on the coefficients in the page.
const recommend = (() => {
  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
  const quadratic = (x, m) => dot(x, m.map((row) => dot(row, x)));
  const rounded = (value, digits) => Number(Number(value).toPrecision(digits));
  /** A number as Python's `%g` writes it. */
  const general = (value, digits) => {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e").map(Number);
    if (exponent >= -4 && exponent < digits) return String(rounded(value, digits));
    return `${mantissa}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
  };
  const fill = (sentence, blanks) => sentence.replace(/\{(\w+)\}/g, (_, name) => blanks[name]);

  /** Every count of a run, after the cells of its family. */
  const describe = (family, params, tokens, experts, topK) => {
    const total = experts === 1 ? params : params * (1 - family.share + (family.share * experts) / topK);
    const embedding = family.embedding === null ? NaN : family.embedding * Math.cbrt(params);
    const each = Math.max(6 * params, Math.exp(family.flops[0] + family.flops[1] * Math.log(params)));
    return {
      params_active_non_embedding: params, params_total_non_embedding: total,
      params_active: params + embedding, params_total: total + embedding,
      params_dense: family.dense === null ? NaN : family.dense * params,
      tokens, flops: each * tokens, experts, top_k: topK, active_ratio: params / total,
      sparsity: 1 - topK / experts, head: family.head === null ? NaN : family.head * Math.cbrt(params),
    };
  };

  const byLaw = (law, inputs) => {
    const named = { ...inputs, params: inputs[law.count] };
    const x = [1, ...law.inputs.map((name, i) => Math.log(named[name]) - law.centre[i])];
    const middle = dot(x, law.theta);
    const half = law.reach === null ? NaN : law.reach * Math.sqrt(quadratic(x, law.covariance) + law.variance);
    return { ...law, value: Math.exp(middle), low: Math.exp(middle - half), high: Math.exp(middle + half) };
  };
  const speaks = (law, inputs) =>
    Object.entries(law.near).every(([column, at]) => Math.abs(Math.log(inputs[column]) - at) <= Math.LN2);

  const bySurface = (surface, quantity, inputs) => {
    const side = surface && surface.sides[quantity];
    if (!side) return null;
    const sparsity = Math.max(0, -Math.log(inputs.active_ratio));
    const x = [1, Math.log(inputs.params_active_non_embedding) - surface.centre[0], Math.log(inputs.tokens) - surface.centre[1]];
    if (surface.sparse) x.push(sparsity);
    for (const [e, k] of surface.families) x.push(Number(e === inputs.experts && k === inputs.top_k));
    const untaught = surface.sparse ? 0 : sparsity;
    const middle = dot(x, side.exponents) + side.mean[0] + side.mean[1] * untaught;
    const variance = quadratic(x, side.covariance) + side.variance[0] + side.variance[1] * untaught ** 2;
    const half = side.reach * Math.sqrt(variance);
    return {
      name: "surface", formula: "the joint surface, whose exponents lean on Step Law's", cells: side.cells, range: side.range,
      cautions: side.cautions, value: Math.exp(middle), low: Math.exp(middle - half), high: Math.exp(middle + half),
    };
  };

  const answer = (data, candidates, quantity, inputs) => {
    for (const group of candidates) {
      const law = group.laws[quantity].find((l) => speaks(l, inputs));
      if (law && law.dof >= 2) return byLaw(law, inputs);
    }
    return bySurface(data.surface, quantity, inputs);
  };

  /** ln of the loss for one row of coefficients. */
  const logLoss = (law, row, inputs) => {
    const value = (name) => row[law.names.indexOf(name)];
    const logs = {
      N: Math.log(inputs[law.count]), D: Math.log(inputs.tokens), C: Math.log(inputs.flops),
      E: Math.log(inputs.experts), "1-S": Math.log(1 - inputs.sparsity),
    };
    if (law.names.includes("E_start")) {
      const top = 1 / value("E_max");
      const share = 1 / value("E_start") - top;
      logs.Eh = -Math.log(share / (1 + share * (inputs.experts - 1)) + top);
    }
    const power = (p) => p.scale * value(p.coefficient) * p.symbols.reduce((product, s) => product * logs[s], 1);
    const terms = law.terms.map((term) => {
      const stated = value(term.amplitude);
      const kind = law.kinds[law.names.indexOf(term.amplitude)];
      const amplitude = kind === "log10" ? stated * Math.LN10 : Math.log(Math.max(stated, 1e-200));
      return term.powers.reduce((sum, p) => sum + power(p), amplitude);
    });
    const most = Math.max(...terms);
    const sum = Math.log(terms.reduce((total, z) => total + Math.exp(z - most), 0)) + most;
    return law.interaction.reduce((total, p) => total + power(p), sum);
  };
  const quantile = (sorted, q) => {
    const at = q * (sorted.length - 1), below = Math.floor(at);
    return sorted[below] + (at - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
  };
  const asked = (inputs) => inputs.tokens / inputs.params_active_non_embedding;
  const expected = (path, inputs) => Math.exp(path.intercept + path.slope * Math.log(inputs.flops));
  /** Whether a run splits its compute as the cells of a law in compute alone did. */
  const near = (path, inputs) => !path || Math.abs(Math.log(asked(inputs) / expected(path, inputs))) <= path.tolerance;
  const lossless = (own, groups, inputs) => {
    const off = groups.map((g) => g.no_loss.off_path).filter((o) => o && !near(o.path, inputs)).at(-1);
    if (!off) return own.no_loss.plain;
    return fill(off.text, { expected: general(expected(off.path, inputs), 2), asked: general(asked(inputs), 2) });
  };
  const expect = (own, groups, inputs) => {
    const law = groups.flatMap((g) => g.losses).find((l) => near(l.path, inputs));
    if (!law) return { value: NaN, low: NaN, high: NaN, cautions: [lossless(own, groups, inputs)] };
    const value = Math.exp(logLoss(law, law.rows[0], inputs));
    if (!law.noise) return { ...law, value, low: NaN, high: NaN };
    const draws = law.rows.slice(1).map((row, i) => logLoss(law, row, inputs) + law.noise[i]).sort((a, b) => a - b);
    return { ...law, value, low: Math.exp(quantile(draws, 0.025)), high: Math.exp(quantile(draws, 0.975)) };
  };

  const usable = (tokens, length) => {
    if (!Number.isFinite(tokens)) return [NaN, null];
    if (!length) return [rounded(tokens, 2), null];
    const wanted = Math.max(tokens / length, 1);
    const quarter = Math.max(1, 2 ** (Math.floor(Math.log2(wanted)) - 2));
    const choices = [1, 2, 3, 4, 5, 6, 7, 8].map((k) => k * quarter);
    const off = (c) => Math.abs(Math.log(c / wanted));
    const sequences = choices.reduce((best, c) => (off(c) < off(best) ? c : best));
    return [sequences * length, sequences];
  };

  const distance = (ranges, inputs) => {
    const columns = { params: "params_active_non_embedding", tokens: "tokens", FLOPs: "flops" };
    return Object.fromEntries(Object.entries(columns).map(([name, column]) => {
      const low = Math.min(...ranges.map((r) => r[name][0])), high = Math.max(...ranges.map((r) => r[name][1]));
      const value = inputs[column];
      return [name, value > high ? value / high : value < low ? value / low : 1];
    }));
  };

  /** The factors of an extrapolation that are long, and any factors in words. */
  const far = (data, factors) =>
    Object.fromEntries(Object.entries(factors).filter(([axis, f]) => Math.max(f, 1 / f) > data.far[axis]));
  const reach = (data, factors, write = (f) => `${general(f, 3)}x`) =>
    [["beyond", (f) => f], ["below", (f) => 1 / f]].map(([side, size]) => {
      const own = Object.entries(factors).filter(([, f]) => size(f) > 1).map(([axis, f]) => `${write(size(f))} in ${axis}`);
      return own.length ? fill(data.words[side], { factors: own.join(", ") }) : "";
    }).filter(Boolean).join("; ");

  const computeOnly = (data, sides, loss, ranges, inputs) => {
    const blind = Object.entries(sides).filter(([, side]) => side?.inputs?.[0] === "flops").map(([quantity]) => quantity);
    if (loss.law === data.compute_loss) blind.push("loss");
    const low = Math.min(...ranges.map((r) => r.ratio[0])), high = Math.max(...ranges.map((r) => r.ratio[1]));
    const inside = asked(inputs) >= low / data.split_margin && asked(inputs) <= high * data.split_margin;
    if (!blind.length || inside) return [];
    const numbers = { low: general(low, 3), high: general(high, 3), asked: general(asked(inputs), 3) };
    return [fill(data.words.compute_only, { quantities: blind.join(" and "), ...numbers })];
  };

  const published = (laws, inputs) => {
    const active = inputs.params_active_non_embedding, head = Number.isFinite(inputs.head) ? inputs.head : 0;
    const body = Math.max(inputs.flops - 6 * head * inputs.tokens, 6 * active * inputs.tokens);
    const features = [active, inputs.params_total_non_embedding, active + (head || NaN),
      inputs.tokens, inputs.flops, body, inputs.experts].map(Math.log);
    const kind = inputs.experts > 1 ? "moe" : "dense";
    const side = (c) => {  // what a law does not read may be unknown
      const log = c ? c[0] + c.slice(1).reduce((sum, x, i) => (x === 0 ? sum : sum + x * features[i]), 0) : NaN;
      return Number.isFinite(log) ? Math.exp(log) : null;
    };
    return laws.filter((l) => l.applies === "both" || l.applies === kind)
      .map((l) => ({ source: l.source, verified: l.verified, learning_rate: side(l.learning_rate), batch_tokens: side(l.batch_tokens) }));
  };

  const answers = (data, architecture, params, tokens, experts, topK) => {
    const own = data.groups[architecture], all = data.groups[data.all];
    const e = experts ?? own.pairs[0][0];
    const same = own.pairs.find((p) => p[0] === e);
    const k = topK ?? (experts === undefined ? own.pairs[0][1] : same ? same[1] : Math.min(own.pairs[0][1], e));
    const foreign = !own.pairs.some((p) => p[0] === e && p[1] === k);
    const candidates = foreign && all ? [all] : !foreign && all ? [own, all] : [own];
    const inputs = describe(candidates[0].family, params, tokens, e, k);
    const rate = answer(data, candidates, "learning_rate", inputs);
    const batch = answer(data, candidates, "batch_tokens", inputs);
    const sides = { learning_rate: rate, batch_tokens: batch };
    const loss = expect(own, [...(foreign ? [] : [own]), ...(all ? [all] : [])], inputs);
    const length = candidates[0].sequence_length;
    const [batchTokens, sequences] = usable(batch ? batch.value : NaN, length);
    const answered = [rate, batch].filter((x) => x);
    const ranges = answered.length ? answered.map((x) => x.range) : [candidates[0].range];
    const factors = distance(ranges, inputs), long = far(data, factors);
    const isLong = Object.keys(long).length > 0;
    const warnings = [
      ...(foreign ? [fill(data.words.foreign, { architecture, experts: e, top_k: k })] : []),
      ...candidates[0].family.notes[e > 1 ? "moe" : "dense"],
      ...Object.keys(sides).filter((q) => !sides[q]).map((q) => own.no_law[q]),
      ...loss.cautions,
      ...(isLong ? [fill(data.words.far, { reach: reach(data, long) })] : []),
      ...computeOnly(data, sides, loss, ranges, inputs),
      ...answered.flatMap((side) => side.cautions),
    ];
    return {
      experts: e, top_k: k, rate, batch, loss, warnings, far: isLong,
      learning_rate: rate ? rounded(rate.value, 3) : NaN,
      batch_tokens: batchTokens, batch_sequences: sequences, sequence_length: length,
      extrapolation: factors,
      published: published(data.published, inputs),
    };
  };
  return Object.assign(answers, { reach, fill });
})();
