"""Corpora become packed rows: sources, records, splits, shards, rows. No torch here.

The four stages are `records.write_records`, `splits.write_splits`, `shards.write_shards` and `rows.write_rows`;
`rows.Rows` reads what the last one made; `python -m qlora_dist.data.show` lets a person see it.
"""
