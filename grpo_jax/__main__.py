import sys

from grpo_jax.cli import main

sys.exit(main())
