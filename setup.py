from pathlib import Path

from setuptools import find_namespace_packages, setup

CLASSIFICATION = [
    "timm>=1.0.31,<1.1",
    "torchvision>=0.21,<1",
    "fvcore>=0.1.5,<0.2",
    "huggingface_hub>=0.23,<3",
    "pillow>=10.3,<14",
    "tensorboard>=2.15,<3",
]
SEGMENTATION = [
    "fvcore>=0.1.5,<0.2",
    "opencv-python>=4.8,<5",
    "torchvision>=0.21,<1",
    "transformers>=4.50,<6",
    "timm>=1.0.31,<1.1",
    "tensorboard>=2.15,<3",
    # what Detectron2 itself needs; its wheel is installed without dependencies
    "cloudpickle>=2,<4",
    "hydra-core>=1.1,<2",
    "iopath>=0.1.7,<0.2",
    "omegaconf>=2.1,<2.4",
    "pillow>=10.3,<14",
    "pycocotools>=2.0.2,<3",
    "tabulate>=0.8,<1",
    "termcolor>=1.1,<4",
    "yacs>=0.1.8,<0.2",
]
SALIENCY = [
    "torchvision>=0.21,<1",
    "opencv-python>=4.8,<5",
    "pillow>=10.3,<14",
    "tensorboard>=2.15,<3",
    "av>=12,<19",
]
DEMO = [*CLASSIFICATION, *SALIENCY, "mlxtend>=0.23,<1", "scikit-learn>=1.4,<2"]

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
        "torch>=2.6,<3",  # before, torch.load(weights_only=True) could run code (CVE-2025-32434)
        "numpy>=1.26,<3",
        "scipy>=1.11,<2",
        "safetensors>=0.4.3,<1",
        "matplotlib>=3.8,<4",
        "tqdm>=4.60,<5",
        "pyyaml>=6,<7",
    ],
    extras_require={
        "cluster": ["submitit>=1.5,<2"],
        "classification": CLASSIFICATION,
        "segmentation": SEGMENTATION,
        "saliency": SALIENCY,
        "huggingface": ["transformers>=4.50,<6"],
        "demo": DEMO,
        "dev": [
            *DEMO,
            "transformers>=4.50,<6",
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.5,<4",
            "submitit>=1.5,<2",
            "webdataset>=1,<2",
            "ruff>=0.9,<1",
            "mypy>=1.14,<3",
            "setuptools>=68",
            "wheel",
            "types-PyYAML",
        ],
    },
)
