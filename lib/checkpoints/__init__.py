"""Files of trained models: this project's, the published release's, and the record of a run."""
