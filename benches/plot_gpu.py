"""Draws what compare_gpu.py measured, as SVG: time against tokens, and time against the share of values kept.

    python3 benches/plot_gpu.py results.json docs/plots

Needs matplotlib.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

DENSE = {"cudnn": "cuDNN f16", "flashinfer fp8": "FlashInfer FP8 (e4m3)"}
STYLE = {
    "cudnn": {"color": "0.35"},
    "flashinfer fp8": {"color": "tab:orange"},
    "keep 64": {"color": "tab:cyan"},
    "keep 39": {"color": "tab:blue"},
    "keep 64 int8": {"color": "tab:cyan", "linestyle": "--"},
    "keep 39 int8": {"color": "tab:blue", "linestyle": "--"},
}
VALUES = {"": ("f16", "tab:blue"), "int8": ("int8", "tab:green"), "e4m3": ("e4m3", "tab:red")}


def ours(name):
    """keep and values of "keep N" or "keep N VALUES"."""
    _, keep, *values = name.split()
    return int(keep), " ".join(values)


def figure(title, x_label):
    made, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label)
    axes.set_ylabel("microseconds")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    return made, axes


def save(made, axes, path):
    axes.legend(fontsize=8, frameon=False)
    made.savefig(path, metadata={"Date": None})
    plt.close(made)
    print(path)


def against_tokens(summary, batch, path):
    points = {}
    for result in summary["results"]:
        if result["model"] == "llama-3-8b" and result["batch"] == batch:
            for name in STYLE:
                if name in result["rows"]:
                    points.setdefault(name, []).append((result["tokens"], result["rows"][name]))
    made, axes = figure(
        f"One decode step, batch {batch}, 32 query and 8 KV heads, head_dim 128, {summary['device']}", "tokens"
    )
    for name, rows in points.items():
        rows.sort(key=lambda row: row[0])
        label = DENSE.get(name)
        if label is None:
            keep, values = ours(name)
            label = f"mustafar {VALUES[values][0]}, keep {keep} of 128"
        axes.plot([t for t, _ in rows], [r["us"] for _, r in rows], marker="o", label=label, markersize=3, **STYLE[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([t for t, _ in rows], [str(t) for t, _ in rows])
    save(made, axes, path)


def against_keep(summary, path):
    sweep = summary["sweep"]
    kept = {}
    for name, row in sweep["rows"].items():
        if name.startswith("keep "):
            keep, values = ours(name)
            kept.setdefault(values, {})[keep] = row["us"]
    made, axes = figure(
        f"One decode step, batch {sweep['batch']} x {sweep['tokens']} tokens, {summary['device']}", "values kept of 128"
    )
    for values, us in kept.items():
        label, color = VALUES[values]
        axes.plot(sorted(us), [us[keep] for keep in sorted(us)], "o-", color=color, label=f"mustafar {label}", markersize=3)
    for name, label in DENSE.items():
        if name in sweep["rows"]:
            axes.axhline(sweep["rows"][name]["us"], linestyle="--", label=label, **STYLE[name])
    axes.set_ylim(bottom=0)
    save(made, axes, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, help="the JSON of compare_gpu.py")
    parser.add_argument("folder", type=pathlib.Path, help="where the SVG files go")
    options = parser.parse_args()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mustafar", "font.size": 9})
    summary = json.loads(options.results.read_text())
    options.folder.mkdir(parents=True, exist_ok=True)
    for batch in (1, 8, 32):
        against_tokens(summary, batch, options.folder / f"attend_tokens_batch_{batch}.svg")
    against_keep(summary, options.folder / "attend_keep.svg")


if __name__ == "__main__":
    main()
