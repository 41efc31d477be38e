"""Real clients against a real server: `make clients` runs these in `.venv-clients`, where torch and the project are not
installed; the server, and what needs its code, run with another interpreter (`LRT_PYTHON`, the one in `.venv`)."""
