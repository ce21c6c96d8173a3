"""One file per training method; `build` chooses by the type of its options."""
