"""The self-test: known layouts, predicted, merged by the real ksmd, counted, unmerged."""
