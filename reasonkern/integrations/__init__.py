"""Drop-ins for trainers; each module imports its trainer, this package imports none of them."""
