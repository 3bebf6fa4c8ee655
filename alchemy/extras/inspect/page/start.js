// Puts the page together: what it is of, the bar that moves through time, the parts.

function bar() {
  const slider = element("input", {type: "range", min: 0, max: time.frames.length - 1, value: 0, id: "step", "aria-label": "step"});
  const said = element("output", {id: "said"});
  let playing = null;
  const button = element("button", {type: "button", id: "play", title: "play (space)"}, "▶");
  function play() {
    if (playing) clearInterval(playing), playing = null;
    else {
      if (time.k === time.frames.length - 1) go(0);
      const pace = Math.max(80, Math.min(400, 9000 / time.frames.length));
      playing = setInterval(() => time.k < time.frames.length - 1 ? go(time.k + 1) : play(), pace);
    }
    button.textContent = playing ? "❚❚" : "▶";
  }
  button.addEventListener("click", play);
  slider.addEventListener("input", () => go(+slider.value));
  const back = element("button", {type: "button", title: "back (arrow left)", onclick: () => go(time.k - 1)}, "‹");
  const on = element("button", {type: "button", title: "on (arrow right)", onclick: () => go(time.k + 1)}, "›");
  document.addEventListener("keydown", event => {
    // What has a use of its own for a key keeps it: a slider its arrows, a button and a summary the space bar.
    const from = event.target.tagName, own = from === "INPUT" || event.key === " " && (from === "BUTTON" || from === "SUMMARY");
    if (own || event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = {ArrowLeft: time.k - 1, ArrowRight: time.k + 1}[event.key];
    if (to !== undefined) go(to);
    else if (event.key === " ") play();
    else return;
    event.preventDefault();
  });
  follow(k => {
    slider.value = k;
    said.textContent = time.frames[k].said;
  });
  document.getElementById("bar").append(back, button, on, slider, said);
}

function facts() {
  const rows = Object.entries(data.facts).filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
    element("tr", {}, element("th", {}, name), element("td", {}, typeof value === "string" ? value : JSON.stringify(value))));
  return element("details.card.full", {}, element("summary", {}, "All settings"), element("table", {}, ...rows));
}

function head() {
  const last = data.stages[data.stages.length - 1];
  const size = last && (data.insertion ? data.insertion.size : [last.pixels[1], last.pixels[0]]).join(" × ");
  const {method, steps, rank, seed, learning_rate: rate} = data.facts;
  const told = last ? `${last.sampler}, guidance ${number(last.guidance)}, ${size}` :
    `${method}, ${steps} steps, ${rank ? `rank ${rank}, ` : ""}learning rate ${rate}`;
  const kind = element("div.label", {}, data.kind || "How this picture was drawn");
  const top = document.getElementById("head");
  const title = element(data.title.length > 120 ? "h1.long" : "h1", {}, data.title);
  top.append(element("div", {}, kind, title, element("p", {}, `${told}, seed ${seed}`)));
  if (last && !data.insertion) top.append(element("img", {src: last.picture, alt: "the finished picture"}));
}

function start() {
  const longest = data.stages.reduce((best, stage) => !best || stage.steps.length > best.steps.length ? stage : best, null);
  if (longest) {
    const count = longest.steps[longest.steps.length - 1].index + 1;
    time.frames = longest.steps.map(({t, index, alpha_bar}) =>
      ({t, said: `step ${index + 1} of ${count} · t ${number(t, 4)} · σ ${number(sigma(alpha_bar))}`}));
  }
  if (data.training) {
    const {moments, losses} = data.training;
    time.frames = moments.map(step => ({said: `after step ${step} of ${losses.length}`}));
  }
  head();
  bar();
  const main = document.getElementById("main");
  if (data.insertion) main.append(compare());
  if (data.stages.length) main.append(element("div.stages" + (data.stages.length > 1 ? ".two" : ""), {}, ...data.stages.map(stageView)));
  if (data.training) main.append(trainingView());
  if (data.insertion) main.append(maskMade(), putBack(data.stages[data.stages.length - 1]), composite());
  main.append(facts());
  go(0);
}

start();
