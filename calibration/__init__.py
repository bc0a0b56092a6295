"""From photographs to a quantization plan, and the plan to Q/DQ nodes in a runtime's dialect."""
