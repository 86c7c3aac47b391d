// HTTP/1.1 without paths: connections, limits and timeouts, over Boost.Beast. Connections cost
// memory, not threads: one that is slow or silent keeps no other waiting, nor a new one out.
#ifndef TERN_SERVER_HTTP_SERVER_H_
#define TERN_SERVER_HTTP_SERVER_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace tern::http {

struct Request {
  std::string method;  // "GET", ...
  std::string path;    // as sent, without the query, and scheme and host if they are there
  std::map<std::string, std::string> headers;  // names in lower case; the last of equal ones
  std::string body;
  std::string client;  // address of the peer
  // The client sends the body once it is told to (Expect: 100-continue): this is the head. The
  // status 100 has the whole request come; any other answer is the last on the connection.
  bool waits = false;
  // Runs a function on one of the server's threads, for work on the answer that would hold up the
  // thread which has it. Thread safe; not to be called once the answer is given.
  std::function<void(std::function<void()>)> post = [](std::function<void()> work) { work(); };
};

struct Response {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;  // further ones
  std::string body;
};

// {"error": message}, as the Open Inference Protocol has it.
Response ErrorResponse(int status, const std::string& message);

// Called on one of the server's threads: must not block. `respond` is to be called exactly once, on
// any thread. A request that waits comes twice, if the first answer is 100.
using Respond = std::function<void(Response)>;
using Handler = std::function<void(Request request, Respond respond)>;

struct ServerOptions {
  std::string host = "0.0.0.0";
  int port = 8502;  // 0 = any free port
  int threads = 2;
  // A further one takes the place of the one that waits for a request longest, which is closed; it
  // is closed itself if none waits.
  int max_connections = 512;
  uint64_t max_header_bytes = 16384;   // 431 beyond
  uint64_t max_body_bytes = 32 << 20;  // 413 beyond
  // Of all bodies that are being received or worked on; 503 beyond, so that many clients cannot
  // fill the memory. At least max_body_bytes.
  uint64_t max_total_body_bytes = 256 << 20;
  // For a whole request to arrive, the wait for it on a connection that stays open included; and
  // for an answer to be taken.
  absl::Duration timeout = absl::Seconds(30);
  // Told of every answer that was given without the handler (400, 413, 431, 501, 503), and with 503
  // of every connection that found no place; may be null. Must not block.
  std::function<void(int status)> refused;
};

// Thread safe.
class Server {
 public:
  // UNAVAILABLE if the port cannot be bound (names it); INVALID_ARGUMENT if `host` is not an IP
  // address.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       Handler handler);
  // Shutdown(0).
  ~Server();

  int port() const;

  // Accepts nothing more and waits up to `grace` for requests that have arrived. A `respond` that
  // comes later is ignored; it may come until the server is destroyed.
  void Shutdown(absl::Duration grace);

 private:
  class Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace tern::http

#endif  // TERN_SERVER_HTTP_SERVER_H_
