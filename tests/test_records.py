"""Records of a study as rows, stages and values."""

import pytest

from kdgqa_jax.records import Results, Row


def record(entry, stage, seed=0, top1=50.0):
    heads = {"num_heads": 8, "num_kv_heads": 4}
    return {"entry": entry, "stage": stage, "seed": seed, "top1": top1, **heads}


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ("gqa", Row("gqa")),
        ("gqa (svd+refit)", Row("gqa", "svd+refit")),
        ("dgqa_ema, K=2, window=100", Row("dgqa_ema", "", ("K=2", "window=100"))),
        ("kdgqa (svd), K=2", Row("kdgqa", "svd", ("K=2",))),
        ("", Row("")),
    ],
)
def test_names_are_taken_apart_and_put_together(entry, row):
    assert Row.parse(entry) == row and row.name == entry


def test_values_are_in_the_order_of_seeds_whatever_that_of_records():
    seeds = (2, 0, 1)
    results = Results([record("gqa", "converted", seed, 10.0 * seed) for seed in seeds])
    assert results.values(Row("gqa"), "converted") == [0.0, 10.0, 20.0]
    assert results.seeds == [0, 1, 2] and results.values(Row("mha"), "converted") == []


def test_rows_share_stages_that_their_settings_do_not_change():
    results = Results(
        [
            record("pretrained", "pretrained", top1=99.0),
            record("gqa, K=2", "converted", top1=1.0),
            record("gqa, K=4", "converted", top1=2.0),
            record("gqa, K=2, epochs=1", "uptrained", top1=3.0),
            record("gqa, K=2, epochs=5", "uptrained", top1=4.0),
            record("gqa, K=4, epochs=1", "uptrained", top1=5.0),
        ]
    )
    names = [row.name for row in results.rows]
    assert names == ["gqa, K=2, epochs=1", "gqa, K=2, epochs=5", "gqa, K=4, epochs=1"]
    assert [results.values(row, "converted") for row in results.rows] == [[1.0], [1.0], [2.0]]
    assert [results.values(row, "uptrained") for row in results.rows] == [[3.0], [4.0], [5.0]]
    assert [r["top1"] for r in results.base()] == [99.0]


def test_a_stage_with_one_folder_counts_once():
    """As results.json has it: a record in each of the cells that share a stage."""
    records = [
        {**record(f"gqa, K={k}, epochs={n}", "converted"), "folder": f"gqa,K={k}"}
        for k in (2, 4)
        for n in (1, 5)
    ]
    results = Results(records)
    assert len(results.rows) == 4
    assert [row.name for row in results.rows_at("converted")] == [
        "gqa, K=2, epochs=1", "gqa, K=4, epochs=1"
    ]  # fmt: skip


def test_probes_belong_to_what_they_probe():
    stages = ("converted", "uptrained 50", "knn converted", "linear uptrained 50")
    base = [record("pretrained", "pretrained"), record("pretrained", "knn pretrained", top1=3.0)]
    results = Results([*base, *(record("gqa", stage) for stage in stages)])
    assert [s for s in results.stages if results.is_probe(s)] == list(stages[2:])
    assert [r["top1"] for r in results.base("knn")] == [3.0]
    assert next(iter(results.last(Row("gqa")).values()))["stage"] == "uptrained 50"


def test_stages_of_untrained_heads_are_left_out_and_their_probes_stay():
    untrained = [
        {**record("mha", "pretrained"), "untrained_head": True},
        {**record("gqa", "converted"), "untrained_head": True},
    ]
    probes = [record("mha", "knn pretrained"), record("gqa", "knn converted")]
    results = Results([*untrained, *probes])
    assert results.stages == ["knn converted"] and results.is_probe("knn converted")
    assert results.base() == [] and results.base("knn") == probes[:1]
    assert Results([*untrained, *probes, record("gqa", "uptrained")]).stages == [
        "knn converted", "uptrained"
    ]  # fmt: skip
    assert Results(untrained).stages == ["converted"]  # better than nothing


def test_records_without_figures_are_of_cells_that_failed():
    failed = {"entry": "gqa", "stage": "uptrained", "seed": 1, "failed": "no memory"}
    lost = record("gqa", "converted", 1)  # the table leaves out what else the cell has
    results = Results([record("gqa", "converted"), lost, failed])
    assert results.values(Row("gqa"), "converted") == [50.0]
    assert results.failed == [failed] and results.stages == ["converted"]
