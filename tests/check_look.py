"""Touch a page of tools/look.py in a browser, read what it shows, and take pictures of it.

    pip install playwright
    python tests/check_look.py --browser /usr/bin/chromium --out shots

Looks at assets/look.html, leaves light.png, dark.png, phone.png and look.png in --out, and with --picture
writes assets/look.png. Not for pytest, because it needs a browser: .ci/run runs it where there is one.
"""

import io
import sys
import tempfile
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "assets" / "look.html"
SWITCHES = ("--no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync").split()

# The contrast of every text with what is behind it, by WCAG 2; 4.5 is wanted, and 3 for large letters.
CONTRASTS = """() => {
  const channels = color => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = color => {
    const [r, g, b] = channels(color).map(c => c / 255).map(
      c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (channels(color)[3] === 255) return color;
    }
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *:not(script, style, svg *)")) {
    const texts = [...element.childNodes].filter(child => child.nodeType === 3 && child.textContent.trim());
    if (!texts.length || !element.getClientRects().length) continue;
    const pair = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) poor.push(`${element.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return poor;
}"""


@contextmanager
def opened(browser, page=DEMO, **settings):
    """A page in a window of its own; afterwards it has asked for nothing else, and nothing has gone wrong."""
    context = browser.new_context(**settings)
    tab = context.new_page()
    asked = []
    wrong = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))

    tab.goto(page.as_uri())
    yield tab
    assert not wrong, wrong
    elsewhere = [url for url in asked if not url.startswith("data:")]
    assert elsewhere == [page.as_uri()], elsewhere
    context.close()


def share(tab, group):
    """The attention that a group gets, in percent, as it is read aloud."""
    label = tab.locator("rect.cell").nth(group).get_attribute("aria-label")
    return float(label.partition(": ")[2].rstrip("%"))


def slide(tab, block):
    """Move the slider to a block."""
    tab.locator("#block").fill(str(block))


# ---------------------------------------------------------------------------- what is touched

def check_groups(tab):
    cells = tab.locator("rect.cell")
    facts = tab.locator("#facts")
    expect(cells).to_have_count(48)

    # Hovered over: its numbers, and its token.
    cells.nth(34).hover()
    expect(facts).to_contain_text("x 56 to 84, y 112 to 140")
    expect(facts).to_contain_text("136 to 139")
    expect(facts).to_contain_text("time 15, row 19, column 17")
    expect(facts).to_contain_text("cache slot  49")
    expect(tab.locator("#fold > summary")).to_have_class("token here")

    # And the other way round.
    tab.locator("#fold > summary").click()
    tab.locator("#inside .token").nth(20).hover()
    expect(facts).to_contain_text("group       20")
    expect(tab.locator("#mark")).to_have_attribute("transform", "translate(112 56)")
    tab.locator("#fold > summary").click()

    # Patches are numbered when asked for.
    expect(tab.locator("#numbers")).to_be_hidden()
    tab.locator("#stored").check()
    expect(tab.locator("#numbers")).to_be_visible()
    tab.locator("#stored").uncheck()


def check_blocks(tab):
    caption = tab.locator("#caption")
    tab.locator("rect.cell").nth(13).click()
    for block, known in ((-1, 1), (0, 16), (1, 48), (2, 48)):
        slide(tab, block)
        expect(caption).to_contain_text(f"Group 13 can have heard from {known} of 48 groups")

    # Its real attention: in a window nothing comes from elsewhere.
    tab.locator("[value=group]").check()
    slide(tab, 0)
    mean = [share(tab, group) for group in range(48)]
    assert abs(sum(mean) - 100) < 1
    outside = [part for group, part in enumerate(mean) if group >= 32 or group % 8 < 4]     # of its window
    assert not any(outside)
    tab.locator("#towerHead").select_option("2")
    expect(caption).to_contain_text("head 2 of group 13")
    assert mean != [share(tab, group) for group in range(48)]


def check_words(tab):
    words = tab.locator("#answer .token")
    expect(words.nth(31)).to_contain_text("red")
    words.nth(31).click()
    expect(words.nth(31)).to_have_attribute("aria-pressed", "true")
    expect(tab.locator("#chances")).to_contain_text("yellow")
    expect(tab.locator("#caption")).to_contain_text("from the first token")

    # The heads that were trained to point, do.
    trained = tab.locator("#heads .trained")
    expect(trained).to_have_count(2)
    for head in (0, 1):
        trained.nth(head).click()
        assert share(tab, 13) > 90
    tab.locator("#heads button").first.click()
    assert 5 < share(tab, 13) < 30

    # A number of a box is one of its sides.
    for word, side in ((10, "M134 24V69"), (15, "M134 24H181"), (21, "M181 24V69"), (24, "M134 69H181")):
        words.nth(word).click()
        expect(tab.locator("#sides")).to_have_attribute("d", side)
    words.nth(0).click()
    expect(tab.locator("#sides")).to_have_attribute("d", "")


def check_keys(tab):
    words = tab.locator("#answer .token")
    words.nth(30).focus()
    tab.keyboard.press("ArrowRight")
    expect(words.nth(31)).to_be_focused()
    expect(words.nth(31)).to_have_attribute("aria-pressed", "true")

    tab.locator("rect.cell").nth(13).focus()
    tab.keyboard.press("ArrowDown")
    expect(tab.locator("#facts")).to_contain_text("group       21")
    tab.keyboard.press("ArrowUp")

    # Tab stops once in the picture, in the answer, at the heads.
    stops = tab.locator("rect.cell[tabindex='0'], #answer [tabindex='0'], #heads [tabindex='0']")
    expect(stops).to_have_count(3)


def check_phone(tab):
    """Touch, and nothing wider than the screen."""
    tab.locator("rect.cell").nth(5).tap()
    expect(tab.locator("#facts")).to_contain_text("group       5")
    tab.locator("#answer .token").nth(10).tap()
    expect(tab.locator("#sides")).to_have_attribute("d", "M134 24V69")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(tab.locator("#picture")).to_be_in_viewport()
    tab.evaluate("scrollTo(0, 0)")
    tab.locator("#answer .token").nth(31).tap()


def check_foreign_text(browser):
    """A prompt that would like to be a script shows as text, and no more."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    import look

    prompt = "</script><script>document.title = 'gotcha'</script>"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "look.html"
        assert look.main(["--prompt", prompt, "--max-new-tokens", "2", "-o", str(page)]) == 0
        with opened(browser, page) as tab:
            expect(tab).to_have_title(f"Look inside: {prompt}")
            expect(tab.locator("header")).to_contain_text(prompt)
            assert tab.evaluate("document.scripts.length") == 2


def check_without_script(browser):
    with opened(browser, java_script_enabled=False) as tab:
        expect(tab.locator("#photo")).to_be_visible()
        expect(tab.locator("#answer")).to_contain_text('"bbox_2d": [134, 24, 181, 69]')
        expect(tab.locator("#heads")).to_be_hidden()


def picture_of_answer(tab):
    """A digit that was a near thing, where it looks, and the side of the box that it writes."""
    tab.set_viewport_size(dict(width=1280, height=560))
    tab.locator("#answer .token").nth(12).click()
    tab.locator("section").nth(2).evaluate("section => { section.scrollIntoView(); scrollBy(0, -20); }")
    return tab.screenshot()


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, help="a folder for pictures")
    parser.add_argument("--picture", action="store_true", help="write assets/look.png")
    args = parser.parse_args()

    wide = dict(viewport=dict(width=1280, height=940))
    phone = dict(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, device_scale_factor=2)
    pictures = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=SWITCHES)
        for name in ("light", "dark"):
            with opened(browser, color_scheme=name, **wide) as tab:
                check_groups(tab)
                check_blocks(tab)
                check_words(tab)
                check_keys(tab)
                assert not tab.evaluate(CONTRASTS), tab.evaluate(CONTRASTS)
            with opened(browser, color_scheme=name, **wide) as tab:
                pictures[name] = tab.screenshot(full_page=True)
                if name == "light":
                    pictures["look"] = picture_of_answer(tab)
        with opened(browser, **phone) as tab:
            check_phone(tab)
            pictures["phone"] = tab.screenshot()
        check_foreign_text(browser)
        check_without_script(browser)
        browser.close()

    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (args.out / f"{name}.png").write_bytes(picture)
    if args.picture:
        picture = Image.open(io.BytesIO(pictures["look"])).convert("RGB")
        picture = picture.quantize(128, dither=Image.Dither.NONE)
        picture.save(ROOT / "assets" / "look.png", optimize=True)
    print("the page works: groups, blocks, words, keys, touch, contrast; foreign text is text")


if __name__ == "__main__":
    main()
