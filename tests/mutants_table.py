"""The faults of `make mutants`: where, the healthy line, the faulty one, and the test that must notice."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    Mutant(
        "MoD's indices are not sorted (B04)",
        "moe_lab/model/depth.py",
        "index, keep = best.sort(dim=1).values, None",
        "index, keep = best, None",
        "tests/test_depth.py::test_training_computes_the_best_c_of_each_sequence[0.75-12]",
    ),
    Mutant(
        "MoD adds the residual twice (B03)",
        "moe_lab/model/depth.py",
        "return x.scatter_add(1, rows, update.type_as(x)), extra",
        "return x.scatter_add(1, rows, (update + x.gather(1, rows)).type_as(x)), extra",
        "tests/test_depth.py::test_training_computes_the_best_c_of_each_sequence[0.75-12]",
    ),
    Mutant(
        "MoD's router weight does not multiply (B05)",
        "moe_lab/model/depth.py",
        "update = y * scores.gather(1, index).sigmoid().unsqueeze(-1)",
        "update = y",
        "tests/test_depth.py::test_router_and_predictor_learn_and_the_predictor_leaves_the_stream_alone",
    ),
    Mutant(
        "MoD's predictor shapes the stream",
        "moe_lab/model/depth.py",
        "predicted = self.predictor(x.detach()).squeeze(-1)",
        "predicted = self.predictor(x).squeeze(-1)",
        "tests/test_depth.py::test_router_and_predictor_learn_and_the_predictor_leaves_the_stream_alone",
    ),
    Mutant(
        "MoD is off in evaluation (B06)",
        "moe_lab/model/depth.py",
        "keep = predicted.gather(1, index) > 0",
        "keep = torch.ones_like(index, dtype=torch.bool)",
        "tests/test_model.py::test_depth_is_at_work_in_evaluation_too",
    ),
    Mutant(
        "evaluation chooses as training does: not causal",
        "moe_lab/model/depth.py",
        "        if self.training:\n",
        "        if True:\n",
        "tests/test_causality.py::test_evaluation_is_causal_at_every_position[mod-5-1]",
    ),
    Mutant(
        "RoPE on ranks in the selection, not positions (B17)",
        "moe_lab/model/transformer.py",
        "result = layer(norm(x), positions, keep)",
        "result = layer(norm(x), torch.arange(x.shape[1]).expand(len(x), -1), keep)",
        "tests/test_generate.py::test_caches_change_nothing[mod-1]",
    ),
    Mutant(
        "the residual is added twice without MoD",
        "moe_lab/model/transformer.py",
        "                x = x + y\n",
        "                x = x + x + y\n",
        "tests/peers/test_peer_model.py::test_the_whole_model_agrees[llama]",
    ),
    Mutant(
        "dt_proj.bias is zeroed (B19)",
        "moe_lab/model/mamba.py",
        "self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))",
        "self.dt_proj.bias.zero_()",
        "tests/test_mamba.py::test_start_values_of_the_state_space[False]",
    ),
    Mutant(
        "Mamba's convolution sees the future",
        "moe_lab/model/mamba.py",
        "[..., : x.shape[1]].transpose(1, 2))",
        "[..., -x.shape[1] :].transpose(1, 2))",
        "tests/test_causality.py::test_evaluation_is_causal_at_every_position[mamba-5-1]",
    ),
    Mutant(
        "a skipped token touches Mamba's state",
        "moe_lab/model/mamba.py",
        "cache.state.copy_(torch.where(rows, state, cache.state))",
        "cache.state.copy_(state)",
        "tests/test_mamba.py::test_a_skipped_token_does_not_touch_the_state",
    ),
    Mutant(
        "the scan is a plain loop over tokens",
        "moe_lab/model/scan.py",
        "chunk = max(1, math.isqrt(length))",
        "chunk = length",
        "tests/test_mamba.py::test_iterations_grow_with_the_root_of_the_length[100]",
    ),
    Mutant(
        "softmax after top-k without normalising",
        "moe_lab/model/moe.py",
        "kept.softmax(dim=-1), expert_ids",
        "logits.softmax(dim=-1).gather(1, expert_ids), expert_ids",
        "tests/test_moe.py::test_weights_sum_to_one_and_are_the_softmax_renormalised[2]",
    ),
    Mutant(
        "unwritten rows of the grouped product leak",
        "moe_lab/model/moe.py",
        "y.masked_fill(nowhere, 0) * weights",
        "y * weights",
        "tests/test_moe.py::test_garbage_rows_reach_neither_outputs_nor_gradients",
    ),
    Mutant(
        "the balance loss has no gradient (B05)",
        "moe_lab/model/moe.py",
        "routing.logits.softmax(dim=-1).mean(dim=0)).sum()",
        "routing.logits.softmax(dim=-1).mean(dim=0)).sum().detach()",
        "tests/test_moe.py::test_balance_loss_and_its_gradient_in_closed_form",
    ),
    Mutant(
        "targets are off by one",
        "moe_lab/model/heads.py",
        "targets = ids[:, ahead:]",
        "targets = ids[:, ahead - 1 : -1]",
        "tests/test_model.py::test_head_losses_follow_a_loop[nothing]",
    ),
    Mutant(
        "padding counts in the loss (B11)",
        "moe_lab/model/heads.py",
        "masked_fill(~mask[:, ahead:], -100)",
        "masked_fill(~mask[:, :-ahead], -100)",
        "tests/test_model.py::test_a_masked_position_is_never_a_target",
    ),
    Mutant(
        "Muon moves an expert that received no token",
        "moe_lab/optim/muon.py",
        "weight.copy_(torch.where(alive, moved, weight))",
        "weight.copy_(moved)",
        "tests/peers/test_peer_muon.py::test_a_slice_without_tokens_is_left_alone_and_the_others_are_not",
    ),
    Mutant(
        "Muon divides a bf16 momentum in place",
        "moe_lab/optim/muon.py",
        "x = x / x.norm().clamp(min=EPSILON)",
        "x.div_(x.norm().clamp(min=EPSILON))",
        "tests/peers/test_peer_muon.py::test_bfloat16_momentum_is_not_normalised_in_place",
    ),
    Mutant(
        "norms decay (B10)",
        "moe_lab/optim/groups.py",
        '"name": "adamw", **no_decay}',
        '"name": "adamw", **decay}',
        "tests/test_optim.py::test_only_matrices_embeddings_and_heads_decay[muon]",
    ),
    Mutant(
        "A_log goes to Muon (B19)",
        "moe_lab/optim/groups.py",
        "    if parts[-1] in MATRICES:",
        '    if parts[-1] in MATRICES or parts[-1] == "A_log":',
        "tests/test_optim.py::test_every_parameter_is_updated_once_by_the_group_of_the_table[mamba-muon]",
    ),
    Mutant(
        "the first update runs at the full LR (B18)",
        "moe_lab/optim/schedule.py",
        "return step / warmup_steps",
        "return 1.0 if step == 1 else step / warmup_steps",
        "tests/test_optim.py::test_the_schedule_in_closed_form[100-10-0.1]",
    ),
    Mutant(
        "a resumed data order is not restored",
        "moe_lab/train/loop.py",
        '        self.batches.load_state_dict(state["data_state"])\n',
        "",
        "tests/test_resume.py::test_three_kills_one_of_them_in_a_save",
    ),
    Mutant(
        "a resumed generator is not restored",
        "moe_lab/train/loop.py",
        '        ckpt.restore_rng(state["rng_state"], self.device)\n',
        "",
        "tests/test_resume.py::test_three_kills_one_of_them_in_a_save",
    ),
    Mutant(
        "resuming brings the old LR back (B13)",
        "moe_lab/train/loop.py",
        "                group.update(given)\n",
        "                pass\n",
        "tests/test_resume.py::test_the_given_config_wins_for_lr_and_budget",
    ),
    Mutant(
        "the gradient is divided twice by the accumulation",
        "moe_lab/train/loop.py",
        "            (sum(terms.values()) / n_micro).backward()",
        "            (sum(terms.values()) / n_micro**2).backward()",
        "tests/test_train.py::test_accumulation_equals_the_big_batch",
    ),
    Mutant(
        "the shown loss is divided twice by the accumulation (B12)",
        "moe_lab/train/loop.py",
        "term.detach() / n_micro\n",
        "term.detach() / n_micro**2\n",
        "tests/test_train.py::test_row_1_holds_what_was_measured_before_update_1",
    ),
    Mutant(
        "intervals count micro-batches (B07)",
        "moe_lab/train/loop.py",
        "if self.step % self.config.training.log_interval == 0 or",
        "if self.step * self.config.training.gradient_accumulation_steps % self.config.training.log_interval == 0 or",
        "tests/test_train.py::test_intervals_count_updates",
    ),
    Mutant(
        "evaluation runs in training mode",
        "moe_lab/train/evaluate.py",
        "    model.eval()\n",
        "",
        "tests/test_train.py::test_validation_loss_is_the_mean_over_every_target",
    ),
    Mutant(
        "a checkpoint is written in place",
        "moe_lab/train/checkpoint.py",
        '    temporary = path.with_name(path.name + ".part")\n',
        "    temporary = path\n",
        "tests/test_checkpoint.py::test_a_crash_in_the_middle_of_a_save_leaves_the_old_file",
    ),
    Mutant(
        "nothing reads a config key (B20)",
        "moe_lab/train/loop.py",
        "training.max_grad_norm)",
        "1.0)",
        "tests/test_config.py::test_every_key_is_read",
    ),
    Mutant(
        "bfloat16 is taken where it does not pay",
        "moe_lab/train/device.py",
        "WORTH_IT = 1.3",
        "WORTH_IT = 1.0",
        "tests/test_train.py::test_auto_takes_bfloat16_where_it_pays",
    ),
]
