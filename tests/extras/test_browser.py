"""The pages in a real browser, opened from disk: controls change the images, the console is clean.

A script goes into a copy of the page. It acts as a reader would and leaves what it saw in the
title, which Chromium prints.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.pages import HOSTILE
from helpers.running import good, picture

import alchemy
from alchemy.extras.inspect import training_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

BEFORE = """<script>
const errors = [];
window.addEventListener("error", event => errors.push(String(event.message)));
window.addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
console.error = (...words) => errors.push(words.join(" "));
</script>"""

AFTER = """<script>
const pause = () => new Promise(done => setTimeout(done, 40));
const find = name => document.querySelector(`canvas[data-shows="${name}"]`);
const all = selector => [...document.querySelectorAll(selector)];
// True if an action changes all of these images, else those that it does not change.
async function changes(names, action) {
  const before = names.map(name => find(name).toDataURL());
  const unchanged = () => names.filter((name, i) => find(name).toDataURL() === before[i]);
  action();
  for (let turn = 0; turn < 50 && unchanged().length; turn++) await pause();
  return unchanged().length ? unchanged() : true;
}
async function countBlank() {
  const blank = () => all("canvas").filter(canvas => canvas.width < 2).length;
  for (let turn = 0; turn < 100 && blank(); turn++) await pause();
  return blank();
}
function slide(k, id = "step") {
  const slider = document.getElementById(id);
  slider.value = k;
  slider.dispatchEvent(new Event("input"));
}
const press = (target, key) =>
  target.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
(async () => {
  const root = document.documentElement, blank = await countBlank();
  const result = {blank, overflow: root.scrollWidth - root.clientWidth};
  try { Object.assign(result, await (async () => { %s })()); }
  catch (error) { errors.push(String(error)); }
  document.title = "RESULT" + JSON.stringify({...result, errors});
})();
</script>"""


def browse(path, actions, tmp_path, width=1280):
    """What the actions (JavaScript) returned from a copy of the page, without any error."""
    text = path.read_text(encoding="utf-8").replace("<head>", "<head>" + BEFORE, 1)
    copy = tmp_path / "copy.html"
    text = text.replace("</body>", AFTER % actions + "</body>")
    copy.write_text(text, encoding="utf-8")
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command = [CHROMIUM, *FLAGS.split(), *flags, "--virtual-time-budget=20000", "--dump-dom"]
    run = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=180)
    title = re.search(r"<title>RESULT(.*?)</title>", run.stdout, re.S)
    assert title, run.stderr[-2000:]
    result = json.loads(html.unescape(title[1]))
    assert (result.pop("errors"), result.pop("blank")) == ([], 0)
    assert result.pop("overflow") <= 0  # nothing is wider than the window
    return result


def test_an_images_page_follows_slider_keys_play_and_tokens(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    _, paths = alchemy.inspect(sdxl, HOSTILE, tmp_path / "page", steps=4)
    result = browse(
        paths[-1],
        """
      const status = () => document.getElementById("status").textContent, result = {};
      const names = ["x_t", "x_0", "eps", "x_prev", "x_0_uncond", "guidance", "decoded"];
      result.slider = await changes([...names, "cross all"], () => slide(3));
      result.status = status();
      result.key = await changes(["x_t", "x_prev"], () => press(document, "ArrowLeft"));
      result.token = await changes(["cross all", "mean all", "strip 0"],
        () => document.querySelector('.chip[data-token="0"]').click());
      const canvas = find("position"), box = canvas.getBoundingClientRect();
      const at = {clientX: box.left + 2, clientY: box.top + 2, bubbles: true};
      result.click = await changes(["self 1", "position"],
        () => canvas.dispatchEvent(new MouseEvent("click", at)));
      result.arrow = await changes(["self 1", "position"], () => press(canvas, "ArrowRight"));
      const before = status();
      press(document.querySelector("#step"), "ArrowLeft");
      press(document.querySelector("summary"), " ");
      press(document.body, "Home");
      const stopped = document.getElementById("play").textContent === "▶";
      result.unused = status() === before && stopped;
      result.strip = await changes(["x_t"], () => find("strip 0").closest("button").click());
      result.play = await changes(["x_t"], () => document.getElementById("play").click());
      result.title = document.querySelector("h1").textContent;
      return result;""",
        tmp_path,
    )
    assert result.pop("title") == HOSTILE
    assert "step 4 of 4 · t 1 " in result.pop("status")
    assert set(map(str, result.values())) == {"True"}, result


def test_an_insertions_page_shows_both_stages_at_one_noise_level(inserted, tmp_path):
    good(inserted("--steps", 8, "--seed", 2, "--strength", 0.5, "--inspect", "page"))
    result = browse(
        tmp_path / "page/index.html",
        """
      const result = {waiting: all(".wait").map(node => node.textContent)};
      result.slider = await changes(["x_t", "inside", "outside", "x_prev blended"],
        () => slide(6));
      const alpha = name => {
        const canvas = find(name), context = canvas.getContext("2d");
        const {data} = context.getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((_, i) => i % 4 === 3);
      };
      const [inside, outside] = [alpha("inside"), alpha("outside")];
      result.alphas = [...new Set([...inside].map((a, i) => a + outside[i]))];
      const clip = () => document.querySelector(".compare img + img").style.clipPath;
      const before = clip();
      slide(80, "compare");
      result.compared = before !== clip();
      return result;""",
        tmp_path,
        width=500,
    )
    assert result["slider"] is True and result["compared"] and result["alphas"] == [255]
    assert result["waiting"][0] == "" and "starts at t = 376" in result["waiting"][1]


def test_a_training_page_opens_at_the_last_step_and_follows_the_slider(taught, tmp_path):
    good(taught("--steps", 3, "--preview-every", 1, "--inspect", "page"))
    result = browse(
        tmp_path / "page/index.html",
        """
      const text = selector => document.querySelector(selector).textContent;
      const shown = () => [text("#status"), text(".column.now .label"),
        all("table.heat td").filter(cell => cell.style.background === "rgb(12, 8, 26)").length];
      const result = {last: shown(), curves: all(".training polyline").length};
      slide(0);
      return {...result, first: shown(), cells: all("table.heat td").length};""",
        tmp_path,
    )
    assert result["last"][:2] == ["after step 3 of 3", "step 3"]
    assert result["last"][2] < result["cells"] / 4
    assert result["first"] == ["after step 0 of 3", "step 0", result["cells"]]
    assert result["curves"] == 1


def check_text(path, tmp_path, present, absent):
    text = browse(path, "return {text: document.body.innerText};", tmp_path)["text"]
    text = " ".join(text.split())
    assert not [words for words in present if words not in text]
    assert not [words for words in absent if words in text.split("All settings")[0]]


def test_the_text_of_a_given_image_and_mask_is_true_of_them(inserted, tmp_path):
    picture(88, 40).save("scene.png")
    picture(88, 40).point(lambda v: 255 * (v > 128)).save("mask.png")
    flags = ("--image", "scene.png", "--mask", "mask.png", "--guidance", 1, "--steps", 2)
    good(inserted(*flags, "--inspect", "page"))
    present = ("40 × 88", "The scene is your own image", "Your mask says", "The mask was given")
    present += ("This holds inside the mask",)
    absent = ("generates the scene", "attention finds", "(cond)")
    check_text(tmp_path / "page/index.html", tmp_path, present, absent)


def test_the_text_of_a_negative_and_a_long_prompt_and_a_hook_is_true(tiny, tmp_path):
    options = dict(steps=12, negative_prompt="a cat", hook=lambda step: None)
    _, paths = alchemy.inspect(alchemy.load(tiny, "cpu"), "dog " * 80, "page", **options)
    present = ("with the negative prompt", "the prompt fills all 77 tokens", "A hook may")
    check_text(paths[-1], tmp_path, present, ("with zeros", "padding after"))


def test_the_text_of_a_resumed_run_without_a_prior_is_true(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    recorder = training_page.TrainingRecorder(sdxl, 6, begin=4)
    assert [step for step, _ in recorder.follow([(5, 0.5), (6, 0.4)])] == [5, 6]
    metadata = {"method": "textual-inversion", "steps": 6, "rank": None, "learning_rate": 0.1}
    metadata |= {"seed": 0, "prior_weight": 1.0}
    losses = [0.5] * 6
    *_, path = training_page.write_training_page("page", recorder, losses, "a dog", metadata)
    check_text(path, tmp_path, ("after step 6 of 6",), ("rank", "prior"))
