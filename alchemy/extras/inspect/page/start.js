// Assembles the page: header, the bar that selects the step, the cards.

function buildBar() {
  const slider = element("input", {type: "range", min: 0, max: timeline.frames.length - 1,
    value: 0, id: "step", "aria-label": "step"});
  const status = element("output", {id: "status"});
  const button = element("button", {type: "button", id: "play", title: "play (space)"}, "▶");
  let timer = null;
  function play() {
    if (timer) {
      clearInterval(timer);
      timer = null;
    } else {
      const last = timeline.frames.length - 1, pause = 9000 / timeline.frames.length;
      if (timeline.k === last) go(0);
      const next = () => timeline.k < last ? go(timeline.k + 1) : play();
      timer = setInterval(next, Math.max(80, Math.min(400, pause)));
    }
    button.textContent = timer ? "❚❚" : "▶";
  }
  button.addEventListener("click", play);
  slider.addEventListener("input", () => go(+slider.value));
  const move = (label, title, by) => element("button", {type: "button", title,
    onclick: () => go(timeline.k + by)}, label);
  document.addEventListener("keydown", event => {
    // Sliders use the arrow keys themselves; buttons and summaries use the space bar.
    const {tagName} = event.target, space = event.key === " ";
    const used = tagName === "INPUT" || space && ["BUTTON", "SUMMARY"].includes(tagName);
    if (used || event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
    if (space) play();
    else if (event.key === "ArrowLeft") go(timeline.k - 1);
    else if (event.key === "ArrowRight") go(timeline.k + 1);
    else return;
    event.preventDefault();
  });
  onStep(k => {
    slider.value = k;
    status.textContent = timeline.frames[k].status;
  });
  document.getElementById("bar").append(move("‹", "back (arrow left)", -1), button,
    move("›", "forward (arrow right)", 1), slider, status);
}

function settingsCard() {
  const known = Object.entries(data.metadata).filter(([, value]) => value !== null && value !== "");
  const rows = known.map(([name, value]) => element("tr", {}, element("th", {}, name),
    element("td", {}, typeof value === "string" ? value : JSON.stringify(value))));
  return element("details.card.full", {}, element("summary", {}, "All settings"),
    element("table", {}, ...rows));
}

function buildHeader() {
  const last = data.stages[data.stages.length - 1];
  const {method, steps, rank, seed, learning_rate: rate} = data.metadata;
  let summary = `${method}, ${steps} steps, ${rank ? `rank ${rank}, ` : ""}learning rate ${rate}`;
  if (last) {
    const [h, w] = last.image_size, size = data.insertion ? data.insertion.size : [w, h];
    summary = `${last.sampler}, guidance ${number(last.guidance)}, ${size.join(" × ")}`;
  }
  const header = document.getElementById("head");
  header.append(element("div", {},
    element("div.label", {}, data.kind || "How this image was generated"),
    element(data.title.length > 120 ? "h1.long" : "h1", {}, data.title),
    element("p", {}, `${summary}, seed ${seed}`)));
  if (last && !data.insertion) {
    header.append(element("img", {src: last.image, alt: "the finished image"}));
  }
}

function buildTimeline() {
  if (data.training) {
    const {recorded_steps, losses} = data.training;
    return recorded_steps.map(step => ({status: `after step ${step} of ${losses.length}`}));
  }
  const {steps} = data.stages.reduce((a, b) => b.steps.length > a.steps.length ? b : a);
  const total = steps[steps.length - 1].index + 1;
  return steps.map(({t, index, alpha_bar: ab}) =>
    ({t, status: `step ${index + 1} of ${total} · t ${number(t, 4)} · σ ${number(sigma(ab))}`}));
}

function start() {
  const {stages, insertion, training} = data, main = document.getElementById("main");
  timeline.frames = buildTimeline();
  buildHeader();
  buildBar();
  if (insertion) main.append(compareCard());
  if (stages.length) {
    const classes = stages.length > 1 ? ".two" : "";
    main.append(element("div.stages" + classes, {}, ...stages.map(stageView)));
  }
  if (training) main.append(trainingView());
  if (insertion) {
    main.append(maskCard(), backgroundCard(stages[stages.length - 1]), compositeCard());
  }
  main.append(settingsCard());
  // index.html#12 opens at that step; a training run is judged by its last one.
  const chosen = location.hash ? +location.hash.slice(1) : training ? Infinity : 0;
  go(chosen);
}

start();
