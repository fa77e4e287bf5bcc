"""Published numbers: those of the papers, each under its own id, and a file that is refused where it is misspelt."""

import pytest
import yaml

from errors import UserError
from metrics.published import load_published
from runtime.experiment import load_preset, preset_names


@pytest.mark.parametrize(
    ("row", "group", "metric", "value"),
    [
        ("table1/sendvae-800", "generation", "FID", 1.75),
        ("table1/sendvae-800", "guided", "FID", 1.21),
        ("table1/sendvae-800", "generation", "IS", 218.57),
        ("table1/sendvae-80", "guided", "Recall", 0.65),
        ("table1/e2evae-800", "guided", "sFID", 4.11),
        ("table1/sdvae-repa-800", "reconstruction", "rFID", 0.61),
        ("table1/vavae-lightningdit-80", "generation", "FID", 4.29),
        ("table2/depth0", "generation", "sFID", 7.06),
        ("table2/depth1", "generation", "FID", 8.42),
        ("table3/with-noise", "generation", "IS", 115.3),
        ("table4/dinov3", "generation", "FID", 7.16),
        ("table4/clip", "generation", "Recall", 0.62),
        ("table5/f16d64-align", "generation", "FID", 10.99),
        ("table5/f16d16-align", "reconstruction", "rFID", 0.47),
        ("table6/sdvae-512-align", "generation", "IS", 93.15),
        ("table7/vavae", "reconstruction", "PSNR", 27.96),
        ("table7/e2evae", "reconstruction", "LPIPS-vgg", 0.110),
        ("table8/sendvae", "probe", "deepfashion/F1", 0.1385),
        ("repae/invae", "guided", "FID", 1.61),
        ("repae_frozen/sdvae-sit", "generation", "FID", 8.30),
        ("repae_balanced/e2evavae-repa", "guided", "FID", 1.12),
        ("vae_repa/b2-vae", "generation", "FID", 28.89),
        ("vae_repa/xl2-vae", "guided", "FID", 1.52),
        ("sra/xl2", "guided", "IS", 311.4),
        ("internal_guidance/xl2", "guided", "FID", 1.46),
        ("sprint/xl2", "guided", "FID", 1.62),
        ("sprint/xl2-repa", "guided", "FID", 1.59),
        ("rae/ditdh-xl-80", "generation", "FID", 2.16),
        ("rae/ditdh-xl-80", "guided", "FID", None),
        ("rae/ditdh-xl-800", "generation", "FID", 1.51),
        ("rae/ditdh-xl-800", "guided", "FID", 1.13),
        # of the same VAE, in another table
        ("table1/sendvae-800", "reconstruction", "PSNR", 27.62),
        ("table4/dinov2", "probe", "celeba/F1", 0.6647),
        # not published
        ("table1/vavae-lightningdit-80", "generation", "IS", None),
        ("table2/depth1", "guided", "FID", None),
        ("vae_repa/b2-none", "reconstruction", "PSNR", None),
    ],
)
def test_figures_of_the_papers(row, group, metric, value):
    published = load_published()
    assert published.value(published.row(row), group, metric) == value


def test_all_rows_are_there():
    rows = load_published().rows
    tables = [name.partition("/")[0] for name in rows]
    counts = {table: tables.count(table) for table in dict.fromkeys(tables)}
    assert counts == {
        "table1": 7, "table2": 3, "table3": 2, "table4": 7, "table5": 6, "table6": 8, "table7": 4, "table8": 4,
        "repae": 3, "repae_frozen": 4, "repae_balanced": 3, "vae_repa": 3, "sra": 1, "sprint": 2, "rae": 2, "raev2": 1,
        "internal_guidance": 2, "jit": 3,
    }  # fmt: skip
    assert "slip" in rows["table5/f16d16"].note
    assert rows["table1/sendvae-80"].epochs == 80
    assert (rows["table2/depth1"].images, rows["table8/invae"].images) == (50_000, None)
    assert load_published().correlations["figure1"].value == -0.9572


def test_rows_that_papers_print_twice_agree():
    rows = load_published().rows
    same = [("table2/depth1", "table3/without-noise"), ("table3/with-noise", "table4/dinov2")]
    same += [("table4/none", "table6/vavae-256"), ("table3/with-noise", "table6/vavae-256-align")]
    for one, other in same:
        assert rows[one].values == rows[other].values
    for vae in ("invae", "vavae", "e2evae", "sendvae"):
        assert rows[f"table7/{vae}"].values["generation/FID"] == rows[f"table8/{vae}"].values["generation/FID"]


def test_presets_name_rows_that_are_there():
    named = {name: load_preset(name).get("published") for name in preset_names()}
    named = {name: row for name, row in named.items() if row}
    assert len(named) >= 30
    for row in named.values():
        load_published().row(row)


def test_a_row_that_is_not_there_is_answered_with_its_likes():
    with pytest.raises(UserError, match=r"no published row table2/depth3; there are .*table2/depth2"):
        load_published().row("table2/depth3")
    with pytest.raises(UserError, match=r"there are internal_guidance/…, jit/…, rae/…, raev2/…, repae/…, .*table8/…"):
        load_published().row("?")


TABLE = {"source": "a", "setting": "b", "columns": ["guided/FID"], "rows": {"r": {"label": "c", "values": [1.5]}}}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"colums": []}, "colums is not known"),
        ({"source": None}, "tables.t has no source"),
        ({"columns": ["guided/FID", "guided/IS"]}, "t/r: 1 values for 2 columns"),
        ({"columns": ["gFID"]}, "column gFID"),
        ({"rows": {"r": {"label": "c", "values": ["1,5"]}}}, r"values\[0\] is '1,5', not a number"),
        ({"rows": {"r": {"label": "c", "values": [1], "see": ["t/s"]}}}, "see names t/s"),
        ({"rows": {"r": [1]}}, "tables.t.rows.r is a list, not an object"),
    ],
)
def test_a_misspelt_file_is_refused(tmp_path, change, part):
    table = {key: value for key, value in (TABLE | change).items() if value is not None}
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump({"tables": {"t": table}, "correlations": {}}))
    with pytest.raises(UserError, match=part):
        load_published(path)
