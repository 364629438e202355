"""Images in shards, archives or Parquet lists that no memory holds: scanned, named or encoded, a Parquet file each."""
