"""Who answers, and answering: placement* and routing* choose a node; pool keeps one child process per model."""
