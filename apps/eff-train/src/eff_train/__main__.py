"""``python -m eff_train``, which torchrun starts."""

from eff_train.cli import main

raise SystemExit(main())
