"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as their binary versions have them: files, records, class order."""

from dataclasses import dataclass

NUM_PIXEL_BYTES = 3 * 32 * 32
HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"

_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail
snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class DataFile:
    """A file of records: one byte per label, the last of them the class, then the red, green and blue planes."""

    name: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How a data set is laid out in its binary version."""

    title: str
    archive: str
    folder: str
    """Name of the folder in the archive."""
    other_versions: dict[str, str]
    """Names in the archives of the versions for other programs, and those programs' names."""
    splits: dict[str, tuple[DataFile, ...]]
    num_values: tuple[int, ...]
    """How many values each label of a record can take."""
    names_file: str
    classes: tuple[str, ...]
    """Names in label order where `names_file` is not there."""

    @property
    def record_size(self) -> int:
        """Bytes per image."""
        return len(self.num_values) + NUM_PIXEL_BYTES

    @property
    def data_files(self) -> tuple[DataFile, ...]:
        """Those of all splits."""
        return tuple(file for files in self.splits.values() for file in files)


DATASETS = {
    "cifar10": Dataset(
        title="CIFAR-10",
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        other_versions={
            "cifar-10-batches-py": "Python",
            "data_batch_1": "Python",
            "cifar-10-batches-mat": "MATLAB",
            "data_batch_1.mat": "MATLAB",
        },
        splits={
            "train": tuple(DataFile(f"data_batch_{number}.bin", 10_000) for number in range(1, 6)),
            "val": (DataFile("test_batch.bin", 10_000),),
        },
        num_values=(10,),
        names_file="batches.meta.txt",
        classes=tuple(_CIFAR10_CLASSES.split()),
    ),
    "cifar100": Dataset(
        title="CIFAR-100",
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        other_versions={"cifar-100-python": "Python", "meta": "Python", "cifar-100-matlab": "MATLAB", "meta.mat": "MATLAB"},
        splits={"train": (DataFile("train.bin", 50_000),), "val": (DataFile("test.bin", 10_000),)},
        num_values=(20, 100),
        names_file="fine_label_names.txt",
        classes=tuple(_CIFAR100_CLASSES.split()),
    ),
}
