"""While a training runs: the Watch, and the branch probe.

watch.py         the Watch: hooks, checks, report
rules.py         the rules in the order in which they are asked
rules_setup.py   who is updated at all: optimizers, frozen parts, decay of norms
rules_start.py   what a fresh model begins with: gains, time steps, units that are alike; dropout
rules_updates.py what becomes of updates: order of events, broken gradients, lost to rounding, one direction only
rules_signal.py  gradients that do not arrive: cut off, gone silent, of no effect
rules_flow.py    targets and data, looks into the future, modes; experts, faint signals; copies, counts and positions beside them
rules_units.py   units and weights: alike, dead, shrunk; what a first layer is given, and answers that depend on nothing
rules_ranks.py   ranks that train together and do not agree
rules_steps.py   the step that arrives: matrix by matrix, its factor and its size; decay that is rounded away
rules_schedule.py learning rates over time: asked for, at first and now; within the budget
rules_loss.py    learning rates beside the usual ones, and how far they reach; the loss that comes of them
rule.py          what a rule is: something to look for, and the words for it
state.py         what is known of a training, which the rules see
tracking.py      which tensors are followed, under which names and in which groups
bank.py          their sampled elements: where they were, are, and were meant to go; who gets a gradient, and how large
intended.py      what a step is meant to do: the optimizer's own, replayed in float32
steps.py         what kind of step an optimizer takes, measured; and tried on made-up gradients: laws of shapes, decay
events.py        backward passes and steps: gradients that pile up, go before the step, or serve twice
ranks.py         what ranks that train together tell each other: do they agree?
doctor.py        doctor train.py: a script is watched without an edit
listener.py      hooks that no error gets past, and parts that listen through them
forward.py       what forward passes tell: vocabulary, the logits' variance, which tensors matter
clips.py         whether clipping finds any gradient
casts.py         casts of weights that autocast keeps beyond an update
copies.py        copies that follow the weights, and the statistics of those that do
outside.py       what else lies outside of the optimizer: tables of positions, buffers that count, batches that come back
routing.py       choices among experts, and scalars that may be terms of the loss
reached.py       the loss's graph: leaves that no optimizer holds, a softmax made twice, one target for all outputs
heard.py         what a language model is asked for: ids, targets, weights, read off the logits' gradient
causal.py        check_causality, and the same of a pass that was heard: later tokens changed
report.py        what was said, the log, and what need not be said again; the readings as a table of text
branch.py        the branch probe: one state, several settings
callback.py      the Watch in a Trainer of transformers
"""
