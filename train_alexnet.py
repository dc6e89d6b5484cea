"""The paper's main job: train AlexNet. See ``python train_alexnet.py --help``."""

from alexkern.training.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
