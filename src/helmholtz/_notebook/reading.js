// The sliders of a reading: what helmholtz._notebook.reading computes for one table, for every position of them.
(() => {
  const BETA = "\u03b2", LAMBDA = "\u03bb", NOTHING = "\u2013";
  const unpack = (text) =>
    new Float64Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const sum = (x) => x.reduce((a, b) => a + b, 0);

  // F(beta) = 1/beta log sum p exp(beta v), shifted by the largest value that is read; the mean at beta = 0
  const freeEnergy = (p, v, beta) => {
    if (beta === 0) return sum(p.map((w, s) => w * v[s]));
    const top = Math.max(...v.filter((_, s) => p[s] > 0));
    const missing = sum(p.map((w, s) => (w > 0 ? w * Math.expm1(beta * (v[s] - top)) : 0)));
    const log = missing > -0.5 ? Math.log1p(missing)
      : Math.log(sum(p.map((w, s) => (w > 0 ? w * Math.exp(beta * (v[s] - top)) : 0))));
    return top + log / beta;
  };

  // the one beta in [0, most] whose free energy is the target
  const hiddenBeta = (p, v, target, most) => {
    let [low, high] = [0, most];
    for (let step = 0; step < 60; step++) {
      const middle = (low + high) / 2;
      if (freeEnergy(p, v, middle) < target) low = middle; else high = middle;
    }
    return (low + high) / 2;
  };

  const readChannel = (p, v, gate, most) => {
    const mean = freeEnergy(p, v, 0), free = mean + gate * (freeEnergy(p, v, most) - mean);
    const spread = sum(p.map((w, s) => w * (v[s] - mean) ** 2));
    const varies = spread > (Number.EPSILON * Math.max(...v.map(Math.abs), 1e-30)) ** 2;
    const beta = varies ? hiddenBeta(p, v, free, most) : NaN;
    const top = Math.max(...v.filter((_, s) => p[s] > 0));
    const tilted = p.map((w, s) => (w > 0 && varies ? w * Math.exp(beta * (v[s] - top)) : w));
    const total = sum(tilted), weights = total > 0 ? tilted.map((w) => w / total) : tilted;
    return { beta, mean, free, kl: varies ? beta * (free - mean) : 0, gate, weights };
  };
  const tokensRead = (weights) => Math.exp(sum(weights.map((w) => (w > 0 ? -w * Math.log(w) : 0))));

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const number = (x, digits = 2) =>
    element("td", { textContent: Number.isNaN(x) ? NOTHING : x.toFixed(digits) });
  const heat = (w) => {
    const cell = element("td", {
      className: "hz-heat" + (w > 0.6 ? " hz-strong" : ""), title: w.toFixed(4),
      textContent: w >= 0.005 ? (100 * w).toFixed(0) : "",
    });
    cell.style.setProperty("--w", w.toFixed(3));
    return cell;
  };

  const start = (root) => {
    const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    const [H, C, T] = data.shape, P = data.priors;
    const prior = unpack(data.prior), values = unpack(data.values), inner = unpack(data.inner);
    const set = { head: data.head, query: T - 1, knob: "as trained", gate: 0.5, beta: 4 };
    const priorOf = (which) => {
      const from = ((set.head * P + (P > 1 ? which : 0)) * T + set.query) * T;
      return Array.from(prior.subarray(from, from + T));
    };

    const show = () => {
      const end = data.causal ? set.query + 1 : T;
      const names = data.words.slice(0, end).map((word, place) =>
        element("th", { className: "hz-token" + (place === set.query ? " hz-here" : ""), textContent: word }));
      const numbers = [`${BETA}*`, "mean", "free energy", "KL, nats", "tokens read", `gate ${LAMBDA}`];
      const heads = numbers.map((name) => element("th", { textContent: name }));
      const first = priorOf(0), nothing = () => element("td", { textContent: NOTHING });
      const rows = [element("tr", { className: "hz-first" }, element("td", { textContent: data.label }),
        ...first.slice(0, end).map(heat), number(0), nothing(), nothing(), number(0),
        number(tokensRead(first), 1), nothing())];
      for (let c = 0; c < C; c++) {
        const v = Array.from(values.subarray((set.head * C + c) * T, (set.head * C + c + 1) * T));
        const trained = inner[(set.head * T + set.query) * C + c];
        const gate = { "as trained": trained, "inner gate": set.gate, beta: 1 }[set.knob];
        const most = set.knob === "beta" ? set.beta : data.beta[set.head * C + c];
        const read = readChannel(priorOf(c + 1), v, gate, most);
        rows.push(element("tr", {}, element("td", { textContent: data.channels[set.head][c] }),
          ...read.weights.slice(0, end).map(heat), number(read.beta), number(read.mean), number(read.free),
          number(read.kl), number(tokensRead(read.weights), 1), number(set.knob === "beta" ? NaN : gate)));
      }
      const table = element("table", { className: "hz-table" },
        element("thead", {}, element("tr", {}, element("th", { textContent: "channel" }), ...names, ...heads)),
        element("tbody", {}, ...rows));
      const frame = root.querySelector(".hz-scroll"), left = frame.scrollLeft;
      frame.replaceChildren(table);
      frame.scrollLeft = left;
    };

    const controls = root.querySelector(".hz-controls"), radios = {};
    const choose = (knob) => { set.knob = knob; radios[knob].checked = true; };
    const slider = (name, label, most, step, knob) => {
      const value = element("output", { textContent: set[name] });
      const input = element("input", { type: "range", min: 0, max: most, step, value: set[name], name });
      input.addEventListener("input", () => {
        set[name] = Number(input.value);
        value.textContent = input.value;
        if (knob) choose(knob);
        show();
      });
      return element("label", {}, element("span", {}, label, " ", value), input);
    };
    const group = `hz-${Math.random().toString(36).slice(2)}`;
    const choices = ["as trained", "inner gate", "beta"].map((knob) => {
      radios[knob] = element("input", { type: "radio", name: group, value: knob, checked: knob === set.knob });
      radios[knob].addEventListener("change", () => { choose(knob); show(); });
      return element("label", { className: "hz-choice" }, radios[knob], knob === "beta" ? BETA : knob);
    });
    if (H > 1) controls.append(slider("head", "head", H - 1, 1));
    if (T > 1) controls.append(slider("query", "token that reads", T - 1, 1));
    controls.append(slider("gate", `inner gate ${LAMBDA} of all channels`, 1, 0.01, "inner gate"),
      slider("beta", `${BETA} of all channels`, data.largest, 0.1, "beta"),
      element("div", { className: "hz-choices" }, ...choices));
    controls.hidden = false;
    show();
  };

  for (const root of document.querySelectorAll(".hz-reading:not([data-started])")) {
    root.dataset.started = "";
    start(root);
  }
})();
