"""What must happen in Redis as one step. KEYS of one tenant: sessions, names, used and, of one session, removed; or, of
prefixes, one hash for each label."""

# Our values are under 2 KiB: longer ones, and keys of another type, are as good as absent and not worth a transfer.
_VALUE_OF = """
local function value_of(text)
  if type(text) ~= 'string' or #text > 4096 then return '' end
  return text
end
"""

STATE = (
    _VALUE_OF
    + """
return {value_of(redis.pcall('HGET', KEYS[1], ARGV[1])), value_of(redis.pcall('GET', KEYS[4]))}
"""
)
"""The entry named ARGV[1] and its last removed generation; empty where there is none."""

PAGE = (
    _VALUE_OF
    + """
local names = redis.pcall('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', ARGV[3], ARGV[4])
if names['err'] then return false end
local rows = {}
for i, name in ipairs(names) do
  rows[i] = {name, value_of(redis.pcall('HGET', KEYS[1], name)), value_of(redis.pcall('ZSCORE', KEYS[3], name))}
end
return rows
"""
)
"""ARGV[4] names from offset ARGV[3] between the bounds ARGV[1] and ARGV[2], each with its entry and last use."""

SWAP = (
    _VALUE_OF
    + """
for i, kind in ipairs({'hash', 'zset', 'zset', 'string'}) do
  local found = redis.call('TYPE', KEYS[i])['ok']
  if found ~= kind and found ~= 'none' then redis.call('DEL', KEYS[i]) end
end
local name, old_value, old_removed, value, used, removed, keep = unpack(ARGV)
if value_of(redis.call('HGET', KEYS[1], name)) ~= old_value then return 0 end
if value_of(redis.call('GET', KEYS[4])) ~= old_removed then return 0 end
if value ~= '' then
  redis.call('HSET', KEYS[1], name, value)
  redis.call('ZADD', KEYS[2], 0, name)
  redis.call('ZADD', KEYS[3], 'GT', used, name)
else
  redis.call('HDEL', KEYS[1], name)
  redis.call('ZREM', KEYS[2], name)
  redis.call('ZREM', KEYS[3], name)
end
if removed ~= '' then redis.call('SET', KEYS[4], removed, 'EX', keep) end
return 1
"""
)
"""Changes one session if its entry and its removed generation are still what they were: 1, else 0."""

READ_CENSUS = """
local text = redis.pcall('GET', KEYS[1])
if type(text) ~= 'string' or #text > tonumber(ARGV[1]) then return {'', 0} end
return {text, redis.call('PTTL', KEYS[1])}
"""
"""What is there, unless it is longer than ARGV[1] bytes, and for how many more milliseconds."""

PUT_PREFIXES = """
for i, name in ipairs(KEYS) do
  local found = redis.call('TYPE', name)['ok']
  if found ~= 'hash' and found ~= 'none' then redis.call('DEL', name) end
  redis.call('HSET', name, ARGV[2 * i - 1], ARGV[2 * i])
end
"""
"""For each label its session and entry: ARGV holds them in pairs."""

FIND_PREFIXES = (
    _VALUE_OF
    + """
local rows = {}
for i, name in ipairs(KEYS) do
  local row, found = {}, redis.pcall('HRANDFIELD', name, ARGV[1], 'WITHVALUES')
  for j = 2, found['err'] and 0 or #found, 2 do row[#row + 1] = value_of(found[j]) end
  rows[i] = row
end
return rows
"""
)
"""For each label the entries of at most ARGV[1] sessions."""

DROP_PREFIX = """
redis.pcall('HDEL', KEYS[1], ARGV[1])
"""
"""Forgets the session ARGV[1] under one label."""
