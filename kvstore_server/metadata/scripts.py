"""What must happen in Redis as one step. KEYS of one tenant: sessions, names, used and, of one session, removed."""

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
