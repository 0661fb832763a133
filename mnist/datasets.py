"""The data sets: MNIST and two that come in the same four files, with what distinguishes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Name = Literal["mnist", "fashion_mnist", "kmnist"]


@dataclass(frozen=True)
class Dataset:
    """One data set: where its files lie, how they are checked, and what they show."""

    name: Name
    title: str
    mirrors: tuple[str, ...]
    """Addresses of folders with the four files, gzip-compressed."""
    sha256: Mapping[str, str]
    """Checksums by file name; under a name that ends in .gz, that of the compressed bytes."""
    class_names: tuple[str, ...]
    box: int
    """The longer side, in pixels, of what the 28×28 pixels show."""
    homepage: str
    license: str


MNIST = Dataset(
    name="mnist",
    title="MNIST",
    mirrors=(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    # Of the uncompressed bytes: gzip headers differ between copies, the contents do not.
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    class_names=tuple("0123456789"),
    box=20,
    homepage="http://yann.lecun.com/exdb/mnist/",
    license="CC BY-SA 3.0, Yann LeCun, Corinna Cortes, Christopher J. C. Burges",
)

# Of these two, the published checksums are those of the compressed files: the figures are from TensorFlow Datasets'
# url_checksums/fashion_mnist.txt and kmnist.txt.
FASHION_MNIST = Dataset(
    name="fashion_mnist",
    title="Fashion-MNIST",
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    box=28,
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    license="MIT, Zalando SE",
)

KMNIST = Dataset(
    name="kmnist",
    title="Kuzushiji-MNIST",
    mirrors=(
        "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
    ),
    sha256={
        "train-images-idx3-ubyte.gz": "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "train-labels-idx1-ubyte.gz": "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "t10k-images-idx3-ubyte.gz": "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "t10k-labels-idx1-ubyte.gz": "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    },
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),  # hiragana, romanised
    box=28,
    homepage="http://codh.rois.ac.jp/kmnist/",
    license="CC BY-SA 4.0, ROIS-DS Center for Open Data in the Humanities",
)

DATASETS: dict[Name, Dataset] = {dataset.name: dataset for dataset in (MNIST, FASHION_MNIST, KMNIST)}
