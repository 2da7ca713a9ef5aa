"""A pattern for each layer: the greedy choice, its recipe, and the sensitivity report."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from nmsweep.calibration.policy import density_of, greedy
from nmsweep.calibration.sensitivity import output_errors
from nmsweep.commands.sensitivity import summary
from nmsweep.config.pattern import Pattern, parse_pattern
from nmsweep.config.recipe import Recipe, read_recipe
from nmsweep.errors import InputError
from nmsweep.models import ModelSpec, linear_flops, load_model
from nmsweep.sparsity.api import assemble, sparsify
from nmsweep.sparsity.install import install

CLI = Callable[..., tuple[int, str, str]]
LADDER = [parse_pattern(word) for word in ("1:4", "2:4", "3:4", "4:4")]
SMALL = ["model=tiny-qwen2", "tasks=mini_prose", "eval.limit=2", "eval.seqlen=64", "dtype=float32",
         "calibration.n_samples=3", "calibration.seqlen=32"]  # fmt: skip


def convex(scale: float) -> dict[Pattern, float]:
    """Errors whose squares grow faster the more is pruned; then the greedy choice is the best one for its density."""
    return {pattern: scale * pattern.sparsity**1.5 for pattern in LADDER}


@pytest.mark.parametrize("density", [0.3, 0.5, 0.55, 0.9])
def test_the_greedy_choice_is_the_best_for_what_it_spends(density: float) -> None:
    errors = {name: convex(scale) for name, scale in {"a": 1.0, "b": 0.2, "c": 0.7, "d": 0.1}.items()}
    cost = dict.fromkeys(errors, 10)
    chosen = greedy(errors, cost, LADDER, density)
    spent = density_of(chosen, cost)
    assert spent <= density

    def total(layers: dict[str, Pattern]) -> float:
        return sum(errors[name][pattern] ** 2 for name, pattern in layers.items())

    others = [dict(zip(errors, choice, strict=True)) for choice in product(LADDER, repeat=4)]
    best = min(total(other) for other in others if density_of(other, cost) <= spent + 1e-9)
    assert total(chosen) == pytest.approx(best)
    assert chosen["a"].sparsity <= chosen["c"].sparsity <= chosen["b"].sparsity <= chosen["d"].sparsity


def test_a_costly_layer_counts_by_its_cost() -> None:
    errors = {"small": convex(1.0), "large": convex(1.0)}
    chosen = greedy(errors, {"small": 1, "large": 9}, LADDER, 0.5)
    assert chosen["large"].sparsity > chosen["small"].sparsity


@pytest.mark.parametrize(
    ("density", "what"), [(0.2, "below the strictest pattern 1:4"), (1.0, "the loosest pattern 4:4")]
)
def test_a_budget_without_a_choice_is_refused(density: float, what: str) -> None:
    with pytest.raises(InputError, match=what):
        greedy({"a": convex(1.0)}, {"a": 1}, LADDER, density)


@pytest.mark.parametrize("criterion", ["act", "rms", "clact", "wanda"])
def test_an_error_is_that_of_the_layer_alone(criterion: str) -> None:
    model: Any = load_model(ModelSpec(name="q", source="tiny", shape="tiny-qwen2"), dtype="float64", device="cpu").model
    ids = torch.randint(3, 259, (3, 16), generator=torch.Generator().manual_seed(0))
    made, _ = assemble("2:4", criterion, "none", "all", {})
    found = output_errors(model, ids, made, LADDER[:3], ["mlp"])
    assert list(found) == [name for name in linear_flops(model) if ".mlp." in name]
    for errors in found.values():
        assert 0 < errors[LADDER[2]] < errors[LADDER[1]] < errors[LADDER[0]]
    if criterion == "act":
        name, seen = "model.layers.0.mlp.down_proj", []
        hook = model.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
        with torch.no_grad():
            model(ids)
            hook.remove()
            with install(model, made, ["*.layers.0.mlp.down_proj"]) as sparse:
                sparse.layers[name].register_forward_hook(lambda module, args, y: seen.append(y))
                model(ids)
        dense, pruned = seen
        assert found[name][LADDER[1]] == pytest.approx(float((pruned - dense).norm() / dense.norm()), rel=1e-9)


def test_a_recipe_is_found_kept_and_run_again(nmsweep: CLI, results: Path, tmp_path: Path) -> None:
    assert nmsweep(*SMALL, "policy=greedy", f"results_dir={results}", "baseline=false")[0] == 0
    [file] = (results / "recipes").iterdir()
    recipe = read_recipe(file)
    assert recipe.density <= 0.5
    assert len(set(recipe.layers.values())) > 1
    shared = tmp_path / "shared.yaml"
    shared.write_text(file.read_text())
    code, _, said = nmsweep(*SMALL, f"policy={shared}", f"results_dir={results}", "baseline=false")
    assert code == 0
    assert "identity watch" not in said, "the recipe of a cell is no other method"
    assert nmsweep("-m", *SMALL, "pattern=8:16,greedy:8:16", "baseline=false", f"results_dir={results}")[0] == 0
    rows = pd.concat([pd.read_csv(path, keep_default_na=False) for path in results.glob("cells/*/metrics.csv")])
    rows = rows[rows["metric"] == "perplexity"]
    by_pattern = rows.set_index("pattern")
    assert set(by_pattern.index) == {"8:16", "greedy:8:16", "recipe-shared:8:16"}
    assert by_pattern.loc["greedy:8:16", "value"] == by_pattern.loc["recipe-shared:8:16", "value"]
    assert by_pattern.loc["greedy:8:16", "value"] != by_pattern.loc["8:16", "value"]
    assert by_pattern.loc["greedy:8:16", "n"] == ""
    model: Any = load_model(ModelSpec(name="q", source="tiny", shape="tiny-qwen2"), dtype="float32", device="cpu").model
    with sparsify(model, recipe=shared) as sparse:
        assert {name: str(layer.slots.pattern) for name, layer in sparse.layers.items()} == {
            name: str(pattern) for name, pattern in recipe.layers.items()
        }
    cell = next(results.glob("cells/*greedy*"))
    layers = pd.read_csv(cell / "layers.csv").set_index("layer")
    for name, pattern in recipe.layers.items():
        assert layers.loc[name, "kept"] / layers.loc[name, "channels"] == pytest.approx(1 - pattern.sparsity)
    moved = shared.rename(tmp_path / "elsewhere.yaml")
    assert "exists" in nmsweep(*SMALL, f"policy={moved}", f"results_dir={results}", "baseline=false")[2]
    moved.write_text(moved.read_text().replace("4:16'\n  model.layers.1", "8:16'\n  model.layers.1", 1))
    assert nmsweep(*SMALL, f"policy={moved}", f"results_dir={results}", "baseline=false")[0] == 0
    assert len(list(results.glob("cells/*recipe*"))) == 2, "another recipe is another cell"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy=greedy", "pattern=dense"], "policy: greedy has no effect with pattern=dense"),
        (["policy=greedy", "pattern=threshold:50%"], "threshold:50% with policy=greedy"),
        (["policy=greedy", "allocation.patterns=2:4"], "leaves nothing to choose"),
        (["policy=greedy", "allocation.patterns=2:4+threshold:50%"], "allocation.patterns: threshold:50%"),
        (["policy=greedy", "allocation.patterns=2:4+5:4"], "allocation.patterns: pattern: '5:4' keeps 5 of 4"),
        (["policy=greedy", "allocation.density=0.1"], "allocation.density: 0.1 is below the strictest"),
        (["policy=greedy", "allocation.patterns=24:48+8:16"], "not a multiple of 48"),
        (["policy=greedy", "mitigation=scale_learned", "calibration.schedule=step"], "calibration.schedule: step"),
        (["policy=nowhere.yaml"], "policy: 'nowhere.yaml' is no file"),
        (["pattern=recipe-mine:8:16"], "pass policy=FILE"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(nmsweep: CLI, results: Path, words: list[str], message: str) -> None:
    code, _, said = nmsweep("model=tiny-llama", f"results_dir={results}", *words)
    assert code == 2
    assert message in said
    assert not results.exists()


def test_a_recipe_of_another_model_is_refused(nmsweep: CLI, results: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    layers = {"model.layers.0.mlp.up_proj": LADDER[0], "model.layers.9.mlp.up_proj": LADDER[1]}
    file.write_text(Recipe(LADDER[1], layers, 0.4).text())
    assert read_recipe(file) == Recipe(LADDER[1], layers, 0.4)
    code, _, said = nmsweep("model=tiny-llama", f"results_dir={results}", f"policy={file}", "targets=*.layers.0.mlp.*")
    assert code == 2
    assert "no pattern for model.layers.0.mlp.gate_proj, model.layers.0.mlp.down_proj" in said
    assert "model.layers.9.mlp.up_proj in the recipe, but no target" in said
    file.write_text("layers: {a: nonsense}\npattern: '2:4'")
    assert "'nonsense' is not a pattern" in nmsweep("model=tiny-llama", f"results_dir={results}", f"policy={file}")[2]


def test_a_skip_list_is_shown_whole_with_the_most_sensitive_layers() -> None:
    """Layers that may not be skipped do not push those out that are."""
    names = [f"model.layers.{block}.{leaf}" for block in range(15) for leaf in ("mlp.down_proj", "mlp.gate_proj")]
    table = pd.DataFrame({"layer": names, "flops_share": 1 / 60})
    table["relative_error"] = [1 - row / 100 if "down" in name else row / 100 for row, name in enumerate(names)]
    table["skip"] = [int("gate" in name and row > 5) for row, name in enumerate(names)]
    said = summary(["amber"], table)
    shown = [line.split()[1] for line in said.splitlines()[1:] if "model." in line]
    assert shown[:10] == names[:20:2]
    assert set(shown[10:]) == set(names[7::2]), "the skipped after the ten worst"
    assert "40.0% of the targets' multiply-adds stay dense" in said
    assert said.endswith("!layers.14.mlp.gate_proj\"'")


def test_sensitivity_is_a_table_and_a_skip_list_that_runs(nmsweep: CLI, results: Path) -> None:
    words = [*SMALL, f"results_dir={results}", "criterion=amber", "pattern=2:4"]
    code, said, errors = nmsweep("sensitivity", *words, "targets=amber", "skip=2")
    assert code == 0, errors
    [file] = (results / "sensitivity").iterdir()
    table = pd.read_csv(file).set_index("layer")
    assert set(table["projection"]) == {"q_proj", "gate_proj", "down_proj"}
    free = table[table["projection"] != "down_proj"]
    assert set(table.index[table["skip"] == 1]) == set(free.nlargest(2, "relative_error").index)
    assert all(f"{name}  skipped\n" in said for name in table.index[table["skip"] == 1])
    skip_list = next(line for line in said.splitlines() if "targets=" in line).strip("'")
    assert nmsweep(*words, skip_list)[0] == 0
    [cell] = [path for path in results.glob("cells/*") if "amber" in path.name]
    assert set(pd.read_csv(cell / "layers.csv")["layer"]) == set(table.index[table["skip"] == 0])
    for wrong in ("skip=99", "skip=x", "policy=greedy"):
        assert nmsweep("sensitivity", *words, wrong)[0] == 2
