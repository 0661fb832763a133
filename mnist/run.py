"""The command `train`, from the data to the report."""

from mnist import report
from mnist.config import Config
from mnist.data import obtain
from mnist.datasets import DATASETS
from mnist.devices import connect, is_main
from mnist.evaluation import VIEWS, probabilities
from mnist.idx import described
from mnist.terminal import say
from mnist.training import fingerprint
from mnist.training import train as fit
from mnist.workdir import alone


def train(config: Config) -> None:
    """Get the data, train, print what came out, and write the report."""
    connect(config)
    dataset = DATASETS[config.dataset]
    splits = obtain(config.data_dir.expanduser(), config.idx_dir, dataset)
    say(f"data: {described(splits, dataset)}")
    with alone(config.workdir):
        result = fit(config, splits)
        p = probabilities(config, result.params, splits["test"].images)  # by all processes together
        accuracy = report.accuracy(p, splits["test"].labels)
        say(f"final test accuracy {accuracy:.2%}, over {len(VIEWS)} views   parameters {fingerprint(result.params)}")
        if is_main():
            report.write(config.workdir / "report", result.history, *splits["test"], p, dataset.class_names)
            say(f"report in {config.workdir / 'report'}")
