// One stage: at each step, what the network saw, what it said, and what was made of it.

const sigma = ab => Math.sqrt((1 - ab) / ab);
const X_T = "<i>x<sub>t</sub></i>", X_0 = "<i>x</i><sub>0</sub>", EPS = "<i>ε</i>", X_PREV = "<i>x</i><sub>prev</sub>";

// Pictures with signs between them. parts: strings (signs, filled in later) and tiles.
function equation(...parts) {
  return element("div.equation", {}, ...parts.map(part => typeof part === "string" ? element("span.sign", {html: part}) : part[0]));
}

// The step of a stage at the time shown: of two stages on one grid, both are at the same noise.
function placed(stage, k) {
  const t = time.frames[k].t, found = stage.steps.findIndex(step => step.t <= t + 1e-6);
  return {k: found < 0 ? stage.steps.length - 1 : found, begun: stage.steps[0].t >= t - 1e-6};
}

function apart(stage) {
  const x_t = tile(`${X_T}, what the network sees`, "x_t");
  const x_0 = tile(`predicted ${X_0}`, "x_0"), eps = tile(`predicted noise ${EPS}`, "eps");
  const shown = equation(x_t, "=", x_0, "+", eps), signs = shown.querySelectorAll(".sign");
  const made = card("", "The network takes the picture apart",
    `It is shown ${X_T}, a mixture of picture and noise, and says which part is noise. What is left is its guess of the finished picture,
     ${X_0}. At the beginning the guess is a blur, the mean of all that could be meant.
     (All these pictures are ${stage.latent[1]} × ${stage.latent[0]} latents, in colours by a linear map that was fitted to this run.)
     <b class="formula">${X_T} = √ᾱ · ${X_0} + √(1 − ᾱ) · ${EPS}</b>` +
    (stage.sampler === "lcm" ? ` LCM puts <i>c</i><sub>skip</sub> · ${X_T} + <i>c</i><sub>out</sub> · ${X_0} in the place of ${X_0},
     nearly the same: so the equation is nearly true.` : ""), shown);
  return [made, k => {
    const ab = stage.steps[k].alpha_bar;
    signs[0].innerHTML = `=<br>${Math.sqrt(ab).toFixed(3)} ×`;
    signs[1].innerHTML = `+<br>${Math.sqrt(1 - ab).toFixed(3)} ×`;
    for (const [name, [, canvas]] of Object.entries({x_t, x_0, eps})) show(canvas, frame(stage.films[name], k));
  }];
}

// What has a part in x_prev beside the sampler.
const CHANGED = {
  mask: ` All this holds inside the mask: outside it the picture on the left is the known scene, put back after the step (see below).`,
  hook: ` A hook may then change it: the picture on the left is what came of that.`,
};

function together(stage) {
  const second = stage.sampler.startsWith("dpmpp");
  const x_prev = tile(`${X_PREV}, where the next step begins`, "x_prev");
  const x_0 = tile(`the same ${X_0}`, "x_0 again"), eps = tile(`the same ${EPS}`, "eps again");
  const shown = equation(x_prev, "=", x_0, "+", eps, ""), signs = shown.querySelectorAll(".sign");
  const made = card("", "The sampler puts it together again, with less noise",
    `The same two parts, mixed for the next, cleaner level of noise. That is the whole of sampling; DDPM, DDIM and Euler differ only in how
     much of the noise is drawn anew (σ) and in the levels they visit.
     <b class="formula">${X_PREV} = √ᾱ<sub>prev</sub> · ${X_0} + √(1 − ᾱ<sub>prev</sub> − σ²) · ${EPS} + σ · <i>z</i></b>` +
    (second ? ` DPM-Solver++(2M) steps towards an ${X_0} extrapolated from its last two guesses: the picture on the left is its own, the
     mixture on the right nearly so.` : "") +
    (stage.sampler === "lcm" ? ` LCM's noise is new: σ = η · √(1 − ᾱ<sub>prev</sub>), with η ${number(stage.eta)}.` : "") +
    (CHANGED[stage.changed] || ""), shown);
  return [made, k => {
    const {alpha_bar_prev: ab, sigma} = stage.steps[k];
    signs[0].innerHTML = `=<br>${Math.sqrt(ab).toFixed(3)} ×`;
    signs[1].innerHTML = `+<br>${Math.sqrt(Math.max(1 - ab - sigma ** 2, 0)).toFixed(3)} ×`;
    signs[2].innerHTML = sigma ? `+<br>${sigma.toFixed(3)} × <i>z</i>` : "";
    for (const [name, [, canvas]] of Object.entries({x_0, eps})) show(canvas, frame(stage.films[name], k));
    show(x_prev[1], next(stage, k));
  }];
}

// The frame of x_prev: where no step was left out, it is the next step's x_t, and not told twice.
function next(stage, k, of = frame) {
  return stage.films.x_prev ? of(stage.films.x_prev, k) : of(stage.films.x_t, k + 1);
}

function guess(stage) {
  const [figure, canvas, words] = tile("", "decoded");
  const made = card("", "Through the VAE",
    `The guess ${X_0} as pixels: the decoder's picture, made at ${stage.decoded.at.length} of the steps (the nearest is shown).`, figure);
  return [made, k => {
    const at = stage.decoded.at, near = nearest(at, k);
    words.textContent = `decoded at step ${stage.steps[at[near]].index + 1}`;
    show(canvas, frame(stage.decoded, near));
  }];
}

// A curve over t from 0 to T with a dot for each step; the step shown stands out.
function plot(stage, label, of, ticks) {
  const W = 320, H = 120, left = 34, T = data.alpha_bar.length * 10, values = data.alpha_bar.map(of).filter(isFinite);
  const low = Math.min(...values), high = Math.max(...values);
  const x = t => left + t / T * (W - left - 8), y = v => 8 + (high - Math.max(v, low)) / (high - low) * (H - 26);
  const line = data.alpha_bar.map((ab, i) => `${x(10 * i).toFixed(1)},${y(of(ab)).toFixed(1)}`).join(" ");
  const dots = stage.steps.map(step => svg("circle", {cx: x(step.t), cy: y(of(step.alpha_bar)), r: 2, class: "dot"}));
  const mark = svg("circle", {r: 5, class: "mark"}), rule = svg("line", {y1: 4, y2: H - 18, class: "rule"});
  const axis = ticks.map(([v, text]) => svg("g", {}, svg("line", {x1: left, x2: W - 8, y1: y(v), y2: y(v), class: "tick"}),
    svg("text", {x: left - 5, y: y(v) + 3.5, "text-anchor": "end"}, text)));
  const drawn = svg("svg", {viewBox: `0 0 ${W} ${H}`, class: "plot"},
    ...axis, svg("polyline", {points: line, class: "curve"}), ...dots, rule, mark,
    svg("text", {x: left, y: H - 4}, "t = 0"), svg("text", {x: W - 8, y: H - 4, "text-anchor": "end"}, `t = ${T}, noise`));
  return [element("figure", {}, drawn, element("figcaption", {html: label})), k => {
    const step = stage.steps[k];
    mark.setAttribute("cx", x(step.t)), mark.setAttribute("cy", y(of(step.alpha_bar)));
    rule.setAttribute("x1", x(step.t)), rule.setAttribute("x2", x(step.t));
  }];
}

function level(stage) {
  const share = plot(stage, "ᾱ, the picture's share of the variance", ab => ab, [[0, "0"], [0.5, "0.5"], [1, "1"]]);
  const ratio = plot(stage, "σ = √((1 − ᾱ)/ᾱ), noise over picture; each line is ten times the one below",
    ab => Math.log10(sigma(ab)), [[-1, "0.1"], [0, "1"], [1, "10"]]);
  const told = element("div");
  const made = card("", "Where on the curve", "How much noise there is at timestep t is fixed beforehand. Each dot is a step.",
    told, share[0], ratio[0]);
  return [made, k => {
    const step = stage.steps[k], ab = step.alpha_bar;
    const to = step.t_prev == null ? "end" : number(step.t_prev, 4);
    told.replaceChildren(numbers([["t", `${number(step.t, 4)}→${to}`], ["ᾱ", number(ab)], ["σ", number(sigma(ab))],
      ["SNR", number(ab / (1 - ab))], ["std of ε", number(step.std.eps)], ["std of x₀", number(step.std.x_0)]]));
    share[1](k), ratio[1](k);
  }];
}

function guidance(stage) {
  const against = stage.negative != null;
  const uncond = tile(`${X_0} if told ${against ? "the negative prompt" : "nothing"}`, "x_0_uncond");
  const cond = tile(`${X_0} if told the prompt`, "x_0_cond");
  const mixed = tile(`${X_0} guided: used`, "x_0 guided"), where = tile("where the two differ", "guidance");
  const untold = `${EPS}<sub>${against ? "negative" : "untold"}</sub>`, told = `${EPS}<sub>told</sub>`, g = number(stage.guidance);
  const made = card("", "Guidance",
    `The network is asked twice, with the prompt and ${against ? "with the negative prompt" : "without (zeros)"}, and the
     difference is exaggerated ${g} times. <b class="formula">${EPS} = ${untold} + ${g} · (${told} − ${untold})</b>`,
    element("div.row.four", {}, uncond[0], cond[0], mixed[0], where[0]));
  return [made, k => {
    const films = stage.films;
    show(uncond[1], frame(films.x_0_uncond, k)), show(cond[1], frame(films.x_0_cond, k)), show(mixed[1], frame(films.x_0, k));
    show(where[1], heat(films.guidance, k));
  }];
}

// The whole stage in a column of its own.
function stageView(stage) {
  const made = [];
  const these = (...parts) => parts.filter(Boolean).map(part => (made.push(part(stage)), made[made.length - 1][0]));
  const wait = element("span.wait");
  const named = stage.name ? [element("h2", {}, stage.name), element("p.prompt", {}, stage.prompt + " ", wait)] : [];
  const column = element("div.stage", {}, ...named,
    element("div.main", {}, ...these(apart, together, stage.guided && guidance)), element("div.side", {}, ...these(guess, level)),
    ...these(stage.mass.length && words, Object.keys(stage.own).length && places),
    Object.keys(stage.own).length ? null : absent("Which places look at which places", "at this size every level of the network has more than 32 × 32 places."));
  follow(at => {
    const {k, begun} = placed(stage, at);
    wait.textContent = begun ? "" : `· begins at t = ${number(stage.steps[0].t, 4)}: its first step is shown`;
    for (const [, update] of made) update(k);
  });
  return column;
}
