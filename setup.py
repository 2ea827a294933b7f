from pathlib import Path

from setuptools import find_namespace_packages, setup

CLASSIFICATION = [
    "timm>=1.0.31,<1.1",
    "torchvision>=0.20",
    "fvcore>=0.1.5",
    "huggingface_hub>=0.23",
    "pillow>=10",
    "pyyaml>=6,<7",
    "tensorboard>=2.15,<3",
]
SEGMENTATION = [
    "fvcore>=0.1.5",
    "opencv-python>=4.8,<5",
    "torchvision>=0.20",
    "transformers>=4.50,<6",
    "timm>=1.0.31,<1.1",
    "tensorboard>=2.15,<3",
    # what Detectron2 itself needs; its wheel is installed without dependencies
    "cloudpickle",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "omegaconf>=2.1,<2.4",
    "pillow>=10",
    "pycocotools>=2.0.2",
    "pyyaml>=6,<7",
    "tabulate",
    "termcolor>=1.1",
    "yacs>=0.1.8",
]
SALIENCY = [
    "torchvision>=0.20",
    "opencv-python>=4.8,<5",
    "pillow>=10",
    "pyyaml>=6,<7",
    "tensorboard>=2.15,<3",
    "av>=12",
]
DEMO = [*CLASSIFICATION, *SALIENCY, "mlxtend>=0.23,<1", "scikit-learn>=1.4"]

setup(
    name="peer-transfer",
    version="0.1.0",
    description="Any N pretrained vision models, made better by teaching each other.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(
        include=["common*", "classification*", "segmentation*", "saliency*"]
    ),
    package_data={
        "classification": ["configs/**/*.yaml"],
        "segmentation": ["configs/**/*.yaml", "detectron2.txt"],
    },
    install_requires=[
        "torch>=2.5",
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "safetensors>=0.4.3,<1",
        "matplotlib>=3.8,<4",
        "tqdm>=4.60,<5",
    ],
    extras_require={
        "classification": CLASSIFICATION,
        "segmentation": SEGMENTATION,
        "saliency": SALIENCY,
        "huggingface": ["transformers>=4.50,<6"],
        "demo": DEMO,
        "dev": [
            *DEMO,
            "transformers>=4.50,<6",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "webdataset>=1,<2",
            "ruff>=0.9",
            "mypy>=1.14",
            "setuptools>=68",
            "wheel",
            "types-PyYAML",
        ],
    },
)
