"""Drop-ins for trainers and engines; each module imports its own, this package none of them."""
