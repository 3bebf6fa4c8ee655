"""The pages in a real browser, opened from disk: the slider, the keys and a click change the pictures, and the console has no error.

A script is put into a copy of the page; it does what a reader would, and leaves what it saw in the title, which Chromium prints.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

import alchemy
from alchemy.extras.inspect import teaching
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import good, inserted, lora_file, picture, quick, taught, tiny  # noqa: F401
from test_inspect import NASTY

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here (Debian's package is chromium)"
)

BEFORE = """<script>
const wrong = [];
window.addEventListener("error", event => wrong.push(String(event.message)));
window.addEventListener("unhandledrejection", event => wrong.push(String(event.reason)));
console.error = (...said) => wrong.push(said.join(" "));
</script>"""

AFTER = """<script>
const pause = () => new Promise(done => setTimeout(done, 40));
const find = name => document.querySelector(`canvas[data-shows="${name}"]`);
const seen = name => find(name).toDataURL();
// Whether an action changes each of these pictures, within some time.
async function changes(names, action) {
  const before = names.map(seen);
  action();
  for (let turn = 0; turn < 50; turn++) {
    await pause();
    if (names.every((name, i) => seen(name) !== before[i])) return true;
  }
  return names.filter((name, i) => seen(name) === before[i]);
}
async function drawn() {
  for (let turn = 0; turn < 100 && [...document.querySelectorAll("canvas")].some(canvas => canvas.width < 2); turn++) await pause();
  return [...document.querySelectorAll("canvas")].filter(canvas => canvas.width < 2).length;
}
const slide = k => { const s = document.getElementById("step"); s.value = k; s.dispatchEvent(new Event("input")); };
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const wide = () => document.documentElement.scrollWidth - document.documentElement.clientWidth;
(async () => {
  const result = {undrawn: await drawn(), wide: wide()};
  try { Object.assign(result, await (async () => { %s })()); } catch (error) { wrong.push(String(error)); }
  document.title = "SEEN" + JSON.stringify({...result, wrong});
})();
</script>"""


def browse(path, actions, tmp_path, width=1280):
    """What the actions (JavaScript that returns an object) saw in a copy of the page, and `wrong`, every error."""
    text = path.read_text(encoding="utf-8")
    copy = tmp_path / "copy.html"
    copy.write_text(
        text.replace("<head>", "<head>" + BEFORE, 1).replace(
            "</body>", AFTER % actions + "</body>"
        ),
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=20000",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    title = re.search(r"<title>SEEN(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


def test_the_page_of_a_picture_follows_slider_keys_play_and_tokens(tiny, tmp_path):
    _, paths = alchemy.inspect(alchemy.load(tiny, "cpu"), NASTY, tmp_path / "page", steps=4)
    seen = browse(
        paths[-1],
        """
      const all = ["x_t", "x_0", "eps", "x_prev", "x_0_uncond", "guidance", "decoded", "cross all"], result = {};
      result.slider = await changes(all, () => slide(3));
      result.said = document.getElementById("said").textContent;
      result.key = await changes(["x_t", "x_prev"], () => press("ArrowLeft"));
      result.token = await changes(["cross all", "mean all", "strip 0"], () => document.querySelector('.chip[data-token="0"]').click());
      result.place = await changes(["own 1", "place"], () => {
        const box = find("place").getBoundingClientRect();
        find("place").dispatchEvent(new MouseEvent("click", {clientX: box.left + 2, clientY: box.top + 2, bubbles: true}));
      });
      result.keys = await changes(["own 1", "place"], () => find("place").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true})));
      const said = () => document.getElementById("said").textContent, held = said();
      for (const [name, key] of [["#step", "ArrowLeft"], ["summary", " "], ["body", "Home"]])
        document.querySelector(name).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      result.left = said() === held && document.getElementById("play").textContent === "▶";
      result.strip = await changes(["x_t"], () => find("strip 0").closest("button").click());
      result.play = await changes(["x_t"], () => document.getElementById("play").click());
      result.chips = document.querySelectorAll(".chip[data-token]").length;
      result.title = document.querySelector("h1").textContent;
      return result;""",
        tmp_path,
    )
    assert seen["wrong"] == [] and seen["undrawn"] == 0 and seen["wide"] <= 0
    assert [
        seen[key] for key in ("slider", "key", "token", "place", "keys", "left", "strip", "play")
    ] == [True] * 8
    assert seen["title"] == NASTY and "step 4 of 4 · t 1 " in seen["said"] and seen["chips"] > 20


def test_the_page_of_an_insertion_shows_both_stages_at_one_noise_level(inserted, tmp_path):
    good(inserted("--steps", 8, "--seed", 2, "--strength", 0.5, "--inspect", "page"))
    seen = browse(
        tmp_path / "page/index.html",
        """
      const result = {begins: [...document.querySelectorAll(".wait")].map(e => e.textContent)};
      result.slider = await changes(["x_t", "inside", "outside", "x_prev blended"], () => slide(6));
      const pixels = name => { const c = find(name); return c.getContext("2d").getImageData(0, 0, c.width, c.height).data; };
      const [inside, outside] = [pixels("inside"), pixels("outside")];
      result.share = [...Array(64).keys()].map(i => inside[4 * i + 3] + outside[4 * i + 3]);
      const after = () => document.querySelector(".compare img + img").style.clipPath, before = after();
      const handle = document.getElementById("compare"); handle.value = 80; handle.dispatchEvent(new Event("input"));
      result.compared = before !== after();
      result.stages = document.querySelectorAll(".stage").length;
      return result;""",
        tmp_path,
        width=500,
    )
    assert seen["wrong"] == [] and seen["undrawn"] == 0 and seen["wide"] <= 0
    assert seen["slider"] is True and seen["compared"] is True and seen["stages"] == 2
    assert (
        seen["begins"][0] == ""
        and "begins at t = 376" in seen["begins"][1]
        and set(seen["share"]) == {255}
    )


def test_the_page_of_a_training_run_follows_the_slider(taught, tmp_path):
    good(taught("--steps", 3, "--preview-every", 1, "--inspect", "page"))
    seen = browse(
        tmp_path / "page/index.html",
        """
      const cell = document.querySelector("table.heat td"), before = cell.style.background;
      slide(3);
      const text = name => document.querySelector(name).textContent;
      return {colour: before !== cell.style.background, now: text(".column.now .label"), said: text("#said"),
              curves: document.querySelectorAll(".lesson polyline").length};""",
        tmp_path,
    )
    assert seen == {
        "undrawn": 0,
        "wide": 0,
        "wrong": [],
        "colour": True,
        "now": "step 3",
        "said": "after step 3 of 3",
        "curves": 1 + 2 * 4,
    }


def test_what_the_page_says_of_a_picture_and_a_mask_of_ones_own_is_true_of_them(inserted, tmp_path):
    (
        picture(88, 40).save("scene.png"),
        picture(88, 40).point(lambda v: 255 * (v > 128)).save("mask.png"),
    )
    good(
        inserted(
            "--image",
            "scene.png",
            "--mask",
            "mask.png",
            "--guidance",
            1,
            "--steps",
            2,
            "--inspect",
            "page",
        )
    )
    seen = browse(tmp_path / "page/index.html", "return {said: document.body.innerText};", tmp_path)
    said = " ".join(seen["said"].split())
    assert seen["wrong"] == [] and all(
        words in said
        for words in (
            "40 × 88",
            "The scene is a picture of your own; your mask says where",
            "It was given;",
            "All this holds inside the mask",
        )
    )
    assert not re.search("unmodified model draws|own attention|told the prompt", said)


def test_what_the_page_says_of_a_negative_and_a_long_prompt_and_of_a_hook(tiny, tmp_path):
    _, paths = alchemy.inspect(
        alchemy.load(tiny, "cpu"),
        "dog " * 80,
        "page",
        steps=12,
        negative_prompt="a cat",
        hook=lambda step: None,
    )
    seen = browse(
        paths[-1],
        """
      const caption = () => find("cross all").parentElement.innerText, first = caption();
      slide(3);
      return {said: document.body.innerText, captions: [first, caption()]};""",
        tmp_path,
    )
    assert ["this step" in seen["captions"][0], "step 3" in seen["captions"][1]] == [
        True,
        True,
    ]  # of twelve steps, ten have maps
    assert seen["wrong"] == [] and all(
        words in seen["said"]
        for words in ("if told the negative prompt", "the prompt fills all 77", "A hook may")
    )
    assert "told nothing" not in seen["said"] and "padding behind" not in seen["said"]


def test_a_run_that_was_resumed_and_has_no_class_is_told_so(tiny, tmp_path):
    watcher = teaching.Watcher(alchemy.load(tiny, "cpu"), lambda t: 1 + t, 6, begin=4)
    assert [step for step, _ in watcher.follow([(5, 0.5), (6, 0.4)])] == [5, 6]
    facts = {
        "method": "textual-inversion",
        "steps": 6,
        "rank": None,
        "learning_rate": 0.1,
        "seed": 0,
        "prior_weight": 1.0,
    }
    *_, path = teaching.write_page("page", watcher, [0.5] * 6, "a dog", facts)
    seen = browse(path, "return {said: document.body.innerText};", tmp_path)
    assert seen["wrong"] == [] and "after step 4, where the run was resumed" in seen["said"]
    assert not re.search(
        "before the first|rank|the class stays", seen["said"].split("All settings")[0]
    )
