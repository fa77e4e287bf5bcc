"""report.html: curves, pictures, escaping, and what a browser makes of it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import same_color
from PIL import Image

import report
from reporting.curves import Chart, Series, charts_of, read_series
from reporting.drawing import COLOURS, chart_figure, downsample, drawing, label_of, scatter_figure, short, write_scatter
from reporting.ema_lengths import length_charts
from reporting.gather import gather
from reporting.pictures import inline
from tests.report_runs import (
    UNGUIDED,
    write_picture,
    write_preset,
    write_probe,
    write_reconstruction,
    write_run,
    write_samples,
)

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
EVIL = "<img src=x onerror=alert(1)>\"'&"
SVG = "data:image/svg+xml;base64,"


class Elements(HTMLParser):
    """All start tags with their attributes, and all text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


def drawn_of(found: Elements) -> list[ElementTree.Element]:
    """The drawings of a page, read as XML."""
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    return [read_svg(source) for source in sources if source.startswith(SVG)]


def read_svg(uri: str) -> ElementTree.Element:
    return ElementTree.fromstring(base64.b64decode(uri.removeprefix(SVG), validate=True))  # noqa: S314, our own


def exps_with_everything(exps: Path) -> list[str]:
    """Two VAEs and three SiTs, measured, of which a preset reproduces a row; returns the report's RUNs."""
    for number, f1 in enumerate((0.52, 0.61, 0.66)):
        vae = f"checksum{number}"
        run = write_run(exps / f"table2-depth{number}-ldm", vae_checksum=vae, encoder_depth=number)
        write_probe(run, f1, "data/celeba", vae)
        write_samples(run, UNGUIDED | {"FID": 12.0 - number}, vae=vae)
        write_preset(exps, f"table2/depth{number}", [run.name], f"table2/depth{number}")
    write_reconstruction(write_run(exps / "mine-vae", "VAE", steps=1000), {"rFID": 0.31, "PSNR": 27.5})
    return [str(exps / "table2-depth?"), str(exps / "mine-vae")]


def page_of(tmp_path: Path, *words: str) -> str:
    path = tmp_path / "report.html"
    assert report.main([*words, "--html", str(path)]) == 0
    return path.read_text()


def test_every_figure_curve_and_picture_is_there(tmp_path):
    text = page_of(tmp_path, *exps_with_everything(tmp_path / "exps"))
    found = Elements(text)
    tables = [tag for tag, _ in found.tags].count("table")
    charts = [attributes.get("class") for tag, attributes in found.tags if tag == "figure"].count("chart")
    images = [a["src"] for tag, a in found.tags if tag == "img" and not a["src"].startswith(SVG)]
    assert tables == 3 + 1 + 1 + 1 + 4  # results, points of Figure 1, runs, flags that differ, settings of each run
    assert charts == 2 + 4 * 3  # compared: loss and val/psnr of three SiTs; each run: loss, psnr, learning rate
    assert len(images) == 3 * 2 + 1  # grid and preview of each SiT, grid of the VAE
    assert len(drawn_of(found)) == charts + 1 + 1  # the scatter; the VAE's loss on both scales
    titles = [attributes["title"] for tag, attributes in found.tags if tag == "i" and "title" in attributes]
    assert {"loss: 1 at step 100", "depth1: F1 0.6100, FID 11", "Send-VAE: F1 0.6647, FID 7.57"} <= set(titles)
    links = [attributes["href"][1:] for tag, attributes in found.tags if tag == "a"]
    assert set(links) <= {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert len(links) == 4 + 4 + 4  # sections and runs, and the runs once more
    for word in ("9.20", "11.00", "table2/depth1", "Pearson's r of F1-macro with FID: ", "--encoder-depth"):
        assert word in " ".join(found.words)
    assert "30.25" in found.words and "val/psnr" in found.words


def write_lengths(exps: Path) -> Path:
    """A run sampled with five weights without guidance, with two of them guided."""
    run = write_run(exps / "several", ema_decay="0.9999,0.999", posthoc_ema="0.05,0.1")
    unguided = {"ema": 9.5, "ema_0.999": 8.5, "posthoc_0.1": 8.0, "posthoc_0.08": 7.5, "model": 20.0}
    for weights, fid in unguided.items():
        write_samples(run, UNGUIDED | {"FID": fid}, name=f"a-{weights}", weights=weights)
    for weights, fid in (("ema", 3.5), ("ema_0.999", 2.5)):
        write_samples(run, UNGUIDED | {"FID": fid}, 2.5, name=f"b-{weights}", weights=weights)
    write_samples(run, UNGUIDED | {"FID": 1.0}, 4.0, name="c-ema")  # nothing to compare it with
    return run


def test_distance_against_the_length_of_the_average(tmp_path):
    run = write_lengths(tmp_path / "exps")
    found = gather([str(run)])
    (chart,) = length_charts(found.runs[0], found.rows)
    assert chart.title == "FID"
    unguided, guided = sorted(chart.series, key=lambda series: -max(series.values))
    assert (unguided.name, guided.name) == (
        "cfg scale 1.0, guidance high 1.0", "cfg scale 2.5, guidance high 0.75",
    )  # fmt: skip
    # an average by a power function looks back a share of its 400 steps: (1 − x)^(γ + 1) = 1/2
    assert unguided.weights == ["posthoc_0.08", "posthoc_0.1", "ema_0.999", "ema"]
    assert unguided.half_lives == pytest.approx([400 * (1 - 0.5 ** (1 / each)) for each in (10.45225, 7.93720)]
                                                + [692.8, 6931.1], rel=1e-4)  # fmt: skip
    assert unguided.values == [7.5, 8.0, 8.5, 9.5]
    assert (guided.weights, guided.values) == (["ema_0.999", "ema"], [2.5, 3.5])

    page = Elements(page_of(tmp_path, str(run)))
    titles = [attributes["title"] for tag, attributes in page.tags if tag == "i" and "title" in attributes]
    assert "ema_0.999: 8.5 (half-life 693 steps)" in titles
    assert page.words.count("weights") == 1  # a column of the results
    plain = write_run(tmp_path / "plain")
    write_samples(plain, UNGUIDED)
    assert "weights" not in Elements(page_of(tmp_path, str(plain))).words


def test_a_length_that_nobody_knows_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")  # an older one, without its flags
    for weights in ("ema", "ema_0.5", "posthoc_x", "posthoc_0.1", "other"):
        write_samples(run, UNGUIDED, name=weights, weights=weights)
    found = gather([str(run)])
    assert length_charts(found.runs[0], found.rows) == []
    assert "posthoc_x" in " ".join(Elements(page_of(tmp_path, str(run))).words)


def test_help_and_refusals_import_nothing_heavy():
    script = "import sys, report; print(*{'matplotlib', 'jinja2', 'PIL', 'torch'} & set(sys.modules))"
    root = Path(report.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_the_page_loads_and_runs_nothing(tmp_path):
    text = page_of(tmp_path, *exps_with_everything(tmp_path / "exps"))
    found = Elements(text)
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag, attributes in found.tags:
        assert tag != "script"
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith(("data:", "#")), (tag, name, value)
    assert not re.search(r"url\(|@import", text)


def test_the_same_runs_give_the_same_page(tmp_path):
    """In another process too, where names hash otherwise and a user's matplotlibrc differs."""
    words = exps_with_everything(tmp_path / "exps")
    first = page_of(tmp_path, *words)
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nfont.size: 20\ntext.usetex: True\n")
    changed = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "SOURCE_DATE_EPOCH": "0"}
    script = [sys.executable, report.__file__, *words, "--html", str(tmp_path / "again.html")]
    subprocess.run(script, check=True, env=os.environ | changed, capture_output=True)
    assert (tmp_path / "again.html").read_text() == first


def test_names_and_values_of_a_run_are_text(tmp_path):
    """A stranger's run in the report can inject nothing, wherever its words appear."""
    folder = write_run(tmp_path / EVIL.replace("/", ""), note=EVIL, vae_checksum=EVIL)
    record = json.loads((folder / "args.json").read_text())
    record |= {"command": ["train_ldm.py", "--x", EVIL], "versions": {EVIL: EVIL}, "git_commit": EVIL}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "status.json").write_text(json.dumps({"state": EVIL, "step": 1, "max_train_steps": 2, "reason": EVIL}))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, EVIL: s, f"val/{EVIL}": s}) + "\n" for s in (1, 9))
    )
    write_picture(folder / "samples" / f"{EVIL}.png")
    write_probe(folder, 0.5, EVIL, EVIL, **{EVIL: 0.5})
    write_samples(folder, {"FID": 1.0, EVIL: 2.0}, vae=EVIL, name=EVIL)
    write_preset(tmp_path, "p", [folder.name])
    preset = tmp_path / "p" / "preset.json"
    preset.write_text(preset.read_text().replace('"p"', json.dumps(EVIL)))
    found = Elements(page_of(tmp_path, str(folder), "--title", EVIL))
    assert {tag for tag, _ in found.tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "h3", "p", "nav", "a", "main",
        "section", "div", "span", "b", "i", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img",
        "details", "summary", "pre", "ul", "li", "footer", "label", "input",
    }  # fmt: skip
    sources = [attributes.get("src") for tag, attributes in found.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert " ".join(found.words).count(EVIL) >= 8
    assert any(attributes.get("title", "").startswith(EVIL) for _, attributes in found.tags)
    assert drawn_of(found)


STRANGE = (
    "$\\frac{1}$",
    "a$b",
    EVIL.replace("/", ""),
    "</text><script>",
    "two\nlines",
    "\x1b[31m",
    "l" * 200,
    "_名前",
    "-->",
)


def test_names_in_a_drawing_are_text(tmp_path):
    """No mathematics, no markup, one line, not too long; and the drawing stays XML."""
    for number, name in enumerate(STRANGE):
        run = write_run(tmp_path / f"ldm{number}", vae_checksum=f"vae{number}", model="$\\x$<b>\n")
        write_probe(run, 0.5 + number / 50, "celeba", f"vae{number}")
        write_samples(run, {"FD-$\\q{<i>": 20.0 - number}, vae=f"vae{number}")
        run.rename(run.with_name(name.replace("/", "")))
    found = gather([str(path) for path in tmp_path.iterdir()])
    (view,) = found.views
    figure, points = scatter_figure(view, found.published)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {label_of(name.replace("/", "")) for name in STRANGE}
    assert "two lines" in texts and "[31m" in texts and max(map(len, texts)) == 32
    root = read_svg(drawing(figure, points).uri)
    kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert kinds <= {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath", "rect"}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    assert texts <= {element.text for element in root.iter() if element.tag.endswith("}text")}
    for suffix in (".png", ".svg", ".pdf"):
        for again in (0, 1):
            write_scatter(view, found.published, tmp_path / f"{again}{suffix}")
        assert (tmp_path / f"0{suffix}").read_bytes() == (tmp_path / f"1{suffix}").read_bytes()
    page = Elements(page_of(tmp_path, *(str(path) for path in tmp_path.iterdir() if path.is_dir())))
    assert "script" not in {tag for tag, _ in page.tags} and len(drawn_of(page)) > 20


def test_long_curves_are_thinned_without_losing_their_extremes():
    values = np.random.default_rng(0).normal(size=10_001)
    values[1234], values[-1] = 50.0, -7.0
    steps, means, minima, maxima = downsample(Series("loss", list(range(10_001)), values.tolist()), 240)
    assert len(steps) == len(means) == len(minima) == len(maxima) <= 240
    assert (max(maxima), steps[-1], means[-1]) == (50.0, 10_000, -7.0)
    assert min(minima) == values.min()
    assert (np.diff(steps) > 0).all()
    assert means[0] == pytest.approx(values[:42].mean()) and steps[0] == 20.5
    few = Series("loss", [1, 2, 3], [5.0, float("nan"), 6.0])
    assert [each.tolist() for each in downsample(few)] == [[1.0, 3.0], [5.0, 6.0], [5.0, 6.0], [5.0, 6.0]]
    assert [each.tolist() for each in downsample(Series("loss", [1, 2], [float("nan"), 1e300]))] == [[], [], [], []]
    for count in (240, 241, 479, 480, 481):
        assert len(downsample(Series("x", list(range(count)), [1.0] * count), 240)[0]) <= 240


def ticks_of(low: float, high: float, log: bool = False) -> list[str]:
    """The numbers that stand at the upright axis."""
    figure, _ = chart_figure(Chart("loss", [Series("loss", [0, 80_000], [low, high])]), log)
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    bottom, top = axis.get_view_interval()
    labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [text.get_text() for at, text in labels if bottom <= at <= top]


def test_axes_have_round_numbers_in_their_range():
    assert ticks_of(0.13, 0.87) == ["0.2", "0.4", "0.6", "0.8"]
    assert ticks_of(0.002, 30, log=True) == ["0.01", "0.1", "1", "10"]
    assert ticks_of(1.0, 9.0, log=True) == ["1", "2", "5", "10"]
    assert ticks_of(5, 5)
    assert [short(v) for v in (0, 12_000, 2.5e6, 1e-5, 0.25, 1234)] == ["0", "12k", "2.5M", "1e-5", "0.25", "1234"]


def test_a_chart_draws_its_series():
    """Data, colours, the band of what is averaged away, and no band where nothing is."""
    long = Series("train", list(range(1000)), [1.0 + step % 2 for step in range(1000)])
    figure, points = chart_figure(Chart("loss", [long, Series("val", [0, 999], [3.0, 2.0])]), log=True)
    (axes,) = figure.axes
    train, val = axes.lines
    assert axes.get_yscale() == "log"
    assert (val.get_xdata().tolist(), val.get_ydata().tolist()) == ([0, 999], [3.0, 2.0])
    assert len(train.get_xdata()) <= 240 and train.get_ydata()[0] == pytest.approx(1.4)
    assert same_color(train.get_color(), COLOURS[0]) and same_color(val.get_color(), COLOURS[1])
    (band,) = axes.collections
    assert {y for _, y in band.get_paths()[0].vertices.tolist()} == {1.0, 2.0}
    assert points[-1] == (999, 2.0, "val: 2 at step 999")
    assert chart_figure(Chart("loss", [Series("loss", [1], [float("inf")])]), log=False) is None


@pytest.mark.parametrize("values", [(1e-3, 1e-3), (99_980.0, 100_010.0), (-2e-4, -1.9e-4)])
def test_the_longest_label_of_a_scale_fits_into_the_figure(values):
    figure, _ = chart_figure(Chart("lr", [Series("lr", [0, 100], list(values))]), log=False)
    figure.draw_without_rendering()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels() if label.get_text()]
    assert len(labels) > 2 and min(label.x0 for label in labels) >= 0


def test_a_value_is_shown_where_its_point_is():
    figure, points = chart_figure(Chart("loss", [Series("loss", [0, 100], [1.0, 3.0])]), log=False)
    axes = figure.axes[0]
    (left, bottom, width, height), margin = axes.get_position().bounds, 0.02 / 1.04
    first, last = drawing(figure, points).marks
    assert first[:2] == pytest.approx(
        (100 * (left + width * margin), 100 * (1 - bottom - height * 0.05 / 1.1)), abs=0.01
    )
    assert last[:2] == pytest.approx(
        (100 * (left + width * (1 - margin)), 100 * (1 - bottom - height * 1.05 / 1.1)), abs=0.01
    )
    assert (first[2], last[2]) == ("loss: 1 at step 0", "loss: 3 at step 100")


def test_the_scatter_draws_measured_points_filled_and_published_ones_hollow(tmp_path):
    found = gather(exps_with_everything(tmp_path / "exps"))
    figure, points = scatter_figure(found.views[0], found.published)
    measured, published = figure.axes[0].collections
    assert measured.get_offsets().tolist() == [[0.52, 12.0], [0.61, 11.0], [0.66, 10.0]]
    assert published.get_offsets().tolist()[0] == [0.6222, 17.43]
    assert len(measured.get_facecolors()) == 1 and len(published.get_facecolors()) == 0
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert labels == {"depth0", "depth1", "depth2", "IN-VAE", "VA-VAE", "E2E-VAE", "Send-VAE"}
    assert len(points) == 7
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("attribute probe, F1", "FID")


def test_charts_go_together_by_what_they_show():
    names = (
        "loss",
        "lr",
        "disc_lr",
        "val/psnr",
        "repa",
        "val/repa",
        "val/align_cosine",
        "val/constant_cosine",
        "epoch",
    )
    series = {name: Series(name, [1, 2], [1.0, 2.0]) for name in names} | {"skipped": Series("skipped", [1], [0.0])}
    found = {chart.title: [line.name for line in chart.series] for chart in charts_of(series)}
    assert found == {
        "loss": ["loss"],
        "psnr": ["val/psnr"],
        "repa": ["repa", "val/repa"],
        "alignment cosine, held out": ["val/align_cosine", "val/constant_cosine"],
        "learning rate": ["lr", "disc_lr"],
    }


@pytest.mark.parametrize(
    ("values", "offered", "default"),
    [([1, 7], False, False), ([1, 9], True, False), ([1, 99], True, True), ([0, 99], False, False)],
)
def test_a_log_scale_is_offered_where_values_span_decades(values, offered, default):
    chart = Chart("loss", [Series("loss", [1, 2], [float(value) for value in values])])
    assert (chart.has_log, chart.log_is_default) == (offered, default)


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "state": "x"}\n{"step": 2, "lo')
    assert read_series(path) == {"loss": Series("loss", [1], [2.0])}
    assert read_series(tmp_path / "nothing") == {}


def test_pictures_are_scaled_and_small_ones_keep_their_pixels(tmp_path):
    write_picture(tmp_path / "small.png", 100, 40)
    small = inline(tmp_path / "small.png")
    assert (small.width, small.kind, small.uri[:22]) == (700, "pixels", "data:image/png;base64,")
    write_picture(tmp_path / "large.png", 3000, 1500)
    large = inline(tmp_path / "large.png", most_pixels=900, most_bytes=50_000)
    assert (large.width, large.kind, large.uri[:15]) == (900, "", "data:image/jpeg")
    assert len(large.uri) < 900 * 450
    (tmp_path / "broken.png").write_bytes((tmp_path / "small.png").read_bytes()[:60])
    assert inline(tmp_path / "broken.png").fault.startswith("broken.png is not readable")


def test_a_damaged_picture_is_said_to_be(tmp_path):
    run = write_run(tmp_path / "mine")
    (run / "samples" / "0000400.png").write_bytes(b"not a picture")
    assert "0000400.png is not readable" in page_of(tmp_path, str(run))


def chromium(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.resolve().as_uri()]
    environment = os.environ | {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it(tmp_path):
    page_of(tmp_path, *exps_with_everything(tmp_path / "exps"))
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    chromium(tmp_path, page, "--window-size=1200,1600", f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (1600, 1200, 3)
    assert (pixels != pixels[0, 0]).any(axis=-1).mean() > 0.05  # ink
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    rows = (pixels != pixels[0, 0]).any(axis=(1, 2))
    assert rows[:200].any() and rows[-200:].any()  # from top to bottom

    answer = chromium(tmp_path, page, "--enable-logging=stderr", "--dump-dom")
    assert "CONSOLE" not in answer.stderr  # neither script errors nor refused loads
    found = Elements(answer.stdout)
    words = " ".join(found.words)
    assert [tag for tag, _ in found.tags].count("table") == 10
    for word in (
        "Generated images",
        "Reconstruction",
        "Probe: attributes",
        "9.20",
        "11.00",
        "27.50",
        "table2-depth1-ldm",
    ):
        assert word in words
    assert not re.search(r"\b(None|NaN|nan|undefined|TODO)\b|\{\w+\}", words.partition("--")[0])
