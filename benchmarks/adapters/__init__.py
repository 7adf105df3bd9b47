"""Published ways of adapting at test time, to compare ours with: each satisfies `edge_agent.adaptation.Method`."""
