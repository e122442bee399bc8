"""Trains the demo model, from nothing or from a checkpoint (--start), writes it as a Hugging Face checkpoint, and
measures it on the test split."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlmtrim.export.demo import task
from vlmtrim.export.demo.evaluate import CHECKPOINT, Demo, accuracy
from vlmtrim.export.demo.model import build_processor
from vlmtrim.export.demo.publish import save_checkpoint, save_examples
from vlmtrim.export.demo.training import Recipe, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="where a run is kept, to go on from")
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="where the checkpoint is written")
    parser.add_argument("--start", type=Path, help="a checkpoint to begin with, instead of random weights")
    parser.add_argument("--layers", type=_numbers, default=(), help="decoder layers of --start to keep, e.g. 0,1,3,7")
    parser.add_argument("--vision-minutes", type=float, default=34, help="time to learn to see")
    parser.add_argument("--minutes", type=float, default=110, help="time to learn to answer")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--questions", type=int, default=2400, help="test questions, one picture and one prompt each")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="measure the checkpoint in --output, train nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.layers and arguments.start is None:
        parser.error("--layers picks decoder layers of a checkpoint; give it with --start")
    if not arguments.evaluate_only:
        _train(arguments)
    demo = Demo(arguments.output)
    if not arguments.evaluate_only:
        save_examples(demo, arguments.work / "examples" if arguments.layers else arguments.output.parent / "examples")
    _report(demo, arguments.questions)


def _train(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    recipe = Recipe(
        arguments.work, arguments.vision_minutes, arguments.minutes, arguments.lr, arguments.start, arguments.layers
    )
    trainer = Trainer(recipe, processor)
    trainer.run()
    save_checkpoint(trainer.model, processor, trainer.curve, arguments.output)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _report(demo: Demo, questions: int) -> None:
    blind = task.blind_accuracy("test", 4000)
    print(f"{'kind':<12}{'accuracy':>9}{'blind':>9}   of {questions} test questions")
    for kind, share in accuracy(demo, "test", questions).items():
        print(f"{kind:<12}{share:>9.3f}" + (f"{blind[kind]:>9.3f}" if kind in blind else ""))


if __name__ == "__main__":
    main()
