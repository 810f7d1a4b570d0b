"""A source and data in, a checkpoint with other norms out: calibration, distillation, and the norms themselves.

`swapping` is the stage; `settings` is what a user chooses, `data` and `examples` what is learnt from, `subject` and
`sites` which norms may go, `norms` what takes their place, `student` and `training` how they learn, `output` and
`fusing` how they vanish again. A new norm is a file of `norms`. What is lossless is none of this room's business: it
asks the rewrites for it.
"""
