//! What the agent counts and measures, as OpenMetrics.
