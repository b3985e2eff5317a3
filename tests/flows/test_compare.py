"""A sweep over criteria, ratios and seeds, run for real on a tiny model: what it shares, its table and its figure."""

import shutil
import statistics

import pytest
import torch
from matplotlib.image import imread

from flows.compare import compare, table
from flows.figure import draw
from saap import load, load_tokenizer, save
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.runs import all_runs
from storage.warehouse import Warehouse
from tasks.data import mini_folder
from tests.flows.conftest import saap
from tests.flows.pages.conftest import rows_in
from tests.flows.test_cli import refused

pytestmark = pytest.mark.slow
SHORT = "speed = { runs = 1, prompt_tokens = 4, new_tokens = 2 }"


@pytest.fixture(scope="module")
def swept(tiny_folder, tmp_path_factory, prefect_server):
    """(config, store) of a finished sweep."""
    from flows.sweep import saap_sweep

    folder = tmp_path_factory.mktemp("sweep")
    file = folder / "criteria.toml"
    file.write_text(f"""
name = "criteria"
store = "{folder / "store"}"
model.path = "{tiny_folder}"
data = "{mini_folder()}"
calibrate = {{ count = 4, length = 16 }}
prune = {{ align = 8, protect = [0, -1] }}
recover = {{ recipe = "none" }}
evaluate = {{ benchmarks = ["wikitext2", "piqa"], windows = [128], max_tokens = 512, limit = 4 }}
speed = {{ runs = 0 }}
compute = {{ device = "cpu", threads = 1 }}
[sweep]
"criterion.name" = ["flap", "wanda_sp"]
"prune.ratio" = [0.2, 0.5]
"calibrate.seed" = [0, 1]
""")
    assert len(saap_sweep(str(file))) == 8
    return file, folder / "store"


def ask(store, query):
    with Warehouse(store).reading() as connection:
        return connection.execute(query).fetchall()


def test_a_sweep_reads_the_model_once_for_each_kind_of_statistics_and_seed(swept):
    found = dict(ask(swept[1], "select stage, (uses, computed)::varchar from stage_reuse"))
    assert found["calibrate"] == "(8, 2)"
    assert found["activations"] == "(4, 2)"
    assert found["rank"] == "(8, 6)"  # of flap one a seed, of wanda_sp, whose statistics follow its cuts, one a run
    assert found["prune"] == "(8, 8)"
    assert found["evaluate"] == "(32, 18)"  # each pruned model, and the dense one
    assert found.keys() == {"calibrate", "activations", "rank", "prune", "evaluate"}


def test_the_pruned_checkpoint_of_flap_carries_its_biases_and_that_of_wanda_sp_none(swept):
    from saap import load

    store = ArtifactStore(swept[1])
    biased = {}
    for stage, key in store.all():
        if stage == "prune":
            manifest, _ = store.inspect(stage, key)
            model = load(store.path(stage, key))
            biased[manifest["params"]["compensation"]] = model.model.layers[2].mlp.down_proj.bias
    assert biased["bias"].abs().max() > 0
    assert biased["none"] is None


def test_the_comparison_is_the_mean_and_the_spread_over_the_seeds(swept):
    file, store = swept
    runs = ask(store, "select criterion, ratio, wikitext2, run_id from leaderboard where variant = 'pruned'")
    query = "select run_id, value from metrics where variant = 'pruned' and benchmark = 'piqa' and papers"
    piqa = dict(ask(store, query))
    comparison = compare(str(file))
    assert (comparison.axes, comparison.missing, comparison.runs) == (["criterion.name"], 0, 8)
    assert [row.variant for row in comparison.rows] == ["dense"] + ["pruned"] * 4
    for row in comparison.rows[1:]:
        mine = [run for run in runs if run[:2] == (row.chosen[0], row.ratio)]
        assert len(mine) == 2
        for measure, values in (("wikitext2", [v for *_, v, _ in mine]), ("piqa", [100 * piqa[r] for *_, r in mine])):
            assert row.mean(measure) == pytest.approx(statistics.mean(values))
            assert row.spread(measure) == pytest.approx(statistics.stdev(values))
    views = ask(store, "select criterion, ratio, seeds, wikitext2, wikitext2_spread, seconds_to_rank from criteria")
    assert len(views) == 4
    for criterion, ratio, seeds, mean, spread, seconds in views:
        row = next(r for r in comparison.rows if (r.chosen, r.ratio) == ((criterion,), ratio))
        assert (seeds, mean, spread) == (2, *(pytest.approx(f("wikitext2")) for f in (row.mean, row.spread)))
        assert seconds == pytest.approx(row.seconds)

    columns, rows = table(comparison)
    assert columns[0] == "criterion"
    wanda = dict(zip(columns, next(r for r in rows if r[0] == "wanda_sp" and r[1] == "0.5"), strict=True))
    assert "Wiki2↓ 223.46" in wanda["paper, llama-7b"]
    published = ask(
        store, "select published, tuned from criteria_published where criterion = 'wanda_sp' and ratio = 0.5"
    )
    assert published == [(223.46, False)]


def test_no_number_of_the_paper_stands_beside_the_mini_packs_and_no_column_of_ones(swept, tmp_path):
    file, _ = swept
    mini = tmp_path / "mini.toml"  # the same texts, so the same artifacts
    mini.write_text(file.read_text().replace(str(mini_folder()), "mini").replace("[0, 1]", "[0]"))
    comparison = compare(str(mini))
    assert comparison.missing == 0
    columns, _ = table(comparison)
    assert not {"seeds", "paper, llama-7b"} & set(columns)


def test_runs_that_are_not_there_are_counted_not_invented(swept, tmp_path):
    file, _ = swept
    more = tmp_path / "more.toml"
    more.write_text(file.read_text().replace('"calibrate.seed" = [0, 1]', '"calibrate.seed" = [0, 1, 2]'))
    comparison = compare(str(more))
    assert (comparison.missing, comparison.runs) == (4, 12)
    assert [row.runs for row in comparison.rows] == [1, 2, 2, 2, 2]


def test_the_command_prints_the_table_and_draws_a_figure_with_every_setting(swept, tmp_path):
    file, _ = swept
    done = saap("compare", file, "--figure", tmp_path / "figure.png")
    assert done.returncode == 0, done.stderr
    for name in ("flap", "wanda_sp", "dense", "Wiki2↓", "PIQA", "s to rank", "figure.png"):
        assert name in done.stdout, name
    picture = imread(tmp_path / "figure.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.02
    draw(compare(str(file)), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    labels = ("flap", "wanda_sp", "ratio 0.2", "ratio 0.5", "dense", "paper, llama-7b, 0.5", "criterion")
    for label in (*labels, "PIQA, %, pruned"):
        assert f"<!-- {label} -->" in text, label


def test_the_lines_below_the_table_name_the_best_and_the_worst(swept):
    file, store = swept
    dense = ask(store, "select any_value(wikitext2) from leaderboard where variant = 'dense'")[0][0]
    found = ask(
        store,
        "select ratio, min_by(criterion, wikitext2), min(wikitext2), max_by(criterion, wikitext2), max(wikitext2) "
        "from criteria group by ratio order by ratio",
    )
    wanted = [
        f"pruned at {ratio:g}: {best} is best on WikiText-2, {_short(low)}, where {worst} has {_short(high)} "
        f"and the dense model {_short(dense)}"
        for ratio, best, low, worst, high in found
    ]
    printed = saap("compare", file).stdout.replace("\n", " ")
    assert len(wanted) == 2
    assert all(line in printed for line in wanted), printed


def _short(perplexity):
    return f"{perplexity:.{0 if perplexity >= 1000 else 1}f}" if perplexity < 1e5 else f"{perplexity:.2e}"


def test_the_page_of_the_sweep_says_what_the_table_says(swept, tmp_path):
    file, _ = swept
    page = tmp_path / "criteria.html"
    assert "page: " in saap("compare", file, "--html", page).stdout
    shown = {
        (row["setting"], row["ratio"]): (
            row["seeds"],
            *(row[name] for name in ("wikitext2", "wikitext2_spread", "piqa", "piqa_spread")),
        )
        for row in rows_in(page, "settings")
        if row["variant"] == "pruned"
    }
    rows = [row for row in compare(str(file)).rows if row.variant == "pruned"]
    assert {
        (row.chosen[0], row.ratio): (
            row.runs,
            *(pytest.approx(of(measure)) for measure in ("wikitext2", "piqa") for of in (row.mean, row.spread)),
        )
        for row in rows
    } == shown


def test_a_report_of_a_sweep_draws_no_table_of_a_run(swept, tmp_path):
    file, store = swept
    refused(saap("report", file, "--store", store, "--svg", tmp_path / "sweep.svg"), "saap compare FILE --figure")


def test_a_figure_of_nothing_or_into_nowhere_is_refused(swept, tmp_path):
    comparison = compare(str(swept[0]))
    with pytest.raises(StorageError, match="cannot write"):
        draw(comparison, tmp_path / "no" / "folder.png")
    with pytest.raises(StorageError, match="cannot write"):
        draw(comparison, tmp_path / "figure.docx")
    comparison.rows = [row for row in comparison.rows if row.variant == "dense"]
    with pytest.raises(StorageError, match="nothing to draw"):
        draw(comparison, tmp_path / "figure.png")


def test_a_run_of_more_steps_is_not_taken_for_one_of_the_sweep(swept, tmp_path, prefect_server):
    from flows.run import saap_run

    file, store = swept
    copy = shutil.copytree(store, tmp_path / "store")
    at = f"store='{copy}'"
    before = compare(str(file), (at,))
    chosen = ["criterion.name='flap'", "prune.ratio=0.2", "calibrate.seed=0"]
    saap_run(str(file), [at, *chosen, "evaluate.benchmarks=['wikitext2', 'piqa', 'arc_easy']"])
    after = compare(str(file), (at,))
    assert after == before
    assert len(all_runs(copy)) == 9


def test_speeds_that_another_machine_measured_are_shown_where_one_run_only_can_be_meant(swept, tmp_path, monkeypatch):
    from flows.sweep import saap_sweep

    file = tmp_path / "timed.toml"
    text = swept[0].read_text().partition("[sweep]")[0].replace("speed = { runs = 0 }", SHORT)
    file.write_text(f"{text}criterion.name = 'flap'\n[sweep]\n\"prune.ratio\" = [0.2]\n")
    store = f"store='{tmp_path / 'store'}'"
    assert len(saap_sweep(str(file), [store])) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = compare(str(file), (store,))
    assert (found.missing, len(found.rows)) == (0, 2)
    both = tmp_path / "both.toml"
    both.write_text(file.read_text() + '"compute.threads" = [1, 2]\n')
    assert compare(str(both), (store,)).missing == 2  # which of them it was cannot be told here


def test_a_sweep_is_shown_also_where_a_run_of_it_failed(swept, tiny_folder, tmp_path):
    model = load(tiny_folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    save(model, broken, load_tokenizer(tiny_folder))
    file = tmp_path / "models.toml"
    text = (
        swept[0].read_text().partition("[sweep]")[0].replace(f'model.path = "{tiny_folder}"', "criterion.name = 'flap'")
    )
    file.write_text(f'{text}[sweep]\n"model.path" = ["{tiny_folder}", "{broken}"]\n')
    done = saap("sweep", file, "--store", tmp_path / "store")
    assert done.returncode == 2, done.stderr
    assert "1 of 2 runs failed" in done.stderr.strip().splitlines()[-1]
    assert "1 of 2 runs are not complete" in done.stdout
    assert (tmp_path / "store" / "models.html").is_file()


def test_the_report_of_a_sweeps_file_is_of_its_own_store(swept, tmp_path, monkeypatch):
    monkeypatch.delenv("SAAP_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    done = saap("report", swept[0], "--html", "page.html")
    assert done.returncode == 0, done.stderr
    assert "8 runs, 0 not made yet" in done.stdout


def test_every_sweep_in_configs_is_valid_and_shares_its_statistics(request):
    from flows.combinations import combinations
    from flows.dag import build
    from tasks.config import load_config

    files = sorted((request.config.rootpath / "configs").glob("*.toml"))
    sweeps = [file for file in files if "[sweep]" in file.read_text()]
    assert len(sweeps) >= 8
    for file in sweeps:
        runs = combinations(str(file))
        assert f"saap sweep configs/{file.name}" in file.read_text()
        at_hand = ('model.path="smollm2-135m"', 'data="mini"', "recover.examples=100")  # the pack has 130 rows
        made = [build(load_config(file, (*chosen, *at_hand))) for chosen in runs]
        stages = [stage for stage, _ in {(step.stage, step.key) for run in made for step in run}]
        samples = {[step.key for step in run if step.stage in ("calibrate", "own_text")][-1] for run in made}
        for statistic in ("score", "activations", "gradients", "fisher"):
            assert stages.count(statistic) <= len(samples), file.name
