#include "server/http/server.h"

#include <algorithm>
#include <atomic>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <list>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "nlohmann/json.hpp"
#include "server/base/clock.h"
#include "server/base/log.h"

namespace tern::http {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace bhttp = boost::beast::http;
using tcp = asio::ip::tcp;
using boost::system::error_code;

using Head = bhttp::request_header<>;

std::string ToString(beast::string_view text) { return std::string(text.data(), text.size()); }

// Without the query; of the absolute form, what comes after scheme and host.
std::string PathOf(beast::string_view target) {
  absl::string_view path(target.data(), target.size());
  path = path.substr(0, path.find('?'));
  for (const absl::string_view scheme : {"http://", "https://"}) {
    if (!absl::StartsWithIgnoreCase(path, scheme)) continue;
    path.remove_prefix(std::min(path.size(), path.find('/', scheme.size())));
    return path.empty() ? "/" : std::string(path);
  }
  return std::string(path);
}

// For what makes it doubtful where the body ends, or whom the request is for. The parser ignores
// codings that it does not know: what is the body to a proxy would be the next request here.
std::optional<Response> Refusal(const Head& head) {
  std::vector<std::string> codings;
  const auto [first, last] = head.equal_range(bhttp::field::transfer_encoding);
  for (auto field = first; field != last; ++field) {
    for (absl::string_view coding : absl::StrSplit(ToString(field->value()), ','))
      codings.push_back(absl::AsciiStrToLower(absl::StripAsciiWhitespace(coding)));
  }
  if (!codings.empty()) {
    if (head.count(bhttp::field::content_length) > 0)
      return ErrorResponse(400, "got Transfer-Encoding and Content-Length, want one of them");
    if (head.version() < 11) return ErrorResponse(400, "Transfer-Encoding: HTTP/1.0 has none");
    if (std::find(codings.begin(), codings.end() - 1, "chunked") != codings.end() - 1)
      return ErrorResponse(400, "Transfer-Encoding: chunked is not the last coding");
    if (codings.size() > 1 || codings[0] != "chunked")
      return ErrorResponse(501, "Transfer-Encoding: want chunked and nothing else");
  }
  const size_t hosts = head.count(bhttp::field::host);
  if (hosts > 1 || (hosts == 0 && head.version() >= 11))
    return ErrorResponse(400, absl::StrCat("Host: got ", hosts, " of them, want one"));
  return std::nullopt;
}

}  // namespace

Response ErrorResponse(int status, const std::string& message) {
  Response response;
  response.status = status;
  const nlohmann::json body = {{"error", message}};
  // Messages quote what clients sent, which may be no UTF-8.
  response.body = body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return response;
}

class Server::Impl {
 public:
  Impl(const ServerOptions& options, Handler handler)
      : options_(options),
        handler_(std::move(handler)),
        acceptor_(asio::make_strand(context_)),
        retry_(acceptor_.get_executor()) {}

  absl::Status Listen() {
    error_code error;
    const auto address = asio::ip::make_address(options_.host, error);
    if (error) {
      return absl::InvalidArgumentError(
          absl::StrCat("address '", options_.host, "': want an IP address"));
    }
    const tcp::endpoint endpoint(address, static_cast<uint16_t>(options_.port));
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (error) {
      return absl::UnavailableError(absl::StrCat("cannot listen on ", options_.host, ":",
                                                 options_.port, ": ", error.message()));
    }
    port_ = acceptor_.local_endpoint(error).port();
    asio::dispatch(acceptor_.get_executor(), [this] { Accept(); });
    for (int i = 0; i < std::max(1, options_.threads); ++i)
      threads_.emplace_back([this] { context_.run(); });
    return absl::OkStatus();
  }

  int port() const { return port_; }

  void Shutdown(absl::Duration grace);

 private:
  class Session;

  void Accept();
  void Refused(int status) const {
    if (options_.refused) options_.refused(status);
  }

  const ServerOptions options_;
  const Handler handler_;
  asio::io_context context_;
  tcp::acceptor acceptor_;
  asio::steady_timer retry_;
  int port_ = 0;
  std::vector<std::thread> threads_;
  std::atomic<bool> stopping_{false};
  std::atomic<uint64_t> body_bytes_{0};
  std::mutex mutex_;
  std::set<std::shared_ptr<Session>> sessions_;
  std::list<Session*> idle_;  // those of sessions_ that wait for a request, the longest first
};

// One connection: requests one after another. Everything runs on the stream's strand but the
// handler's answer, which is posted to it.
class Server::Impl::Session final : public std::enable_shared_from_this<Session> {
 public:
  Session(Impl* server, tcp::socket socket)
      : server_(server), options_(server->options_), stream_(std::move(socket)) {
    error_code ignored;
    const asio::ip::address address = stream_.socket().remote_endpoint(ignored).address();
    const bool mapped = address.is_v6() && address.to_v6().is_v4_mapped();
    client_ = mapped ? asio::ip::make_address_v4(asio::ip::v4_mapped, address.to_v6()).to_string()
                     : address.to_string();
  }

  void Start() {
    asio::dispatch(stream_.get_executor(), [self = this->shared_from_this()] { self->Read(); });
  }

  // Ends the connection, after the answer if a request is worked on.
  void Stop() {
    asio::post(stream_.get_executor(), [self = this->shared_from_this()] {
      if (!self->busy_) self->Close();
    });
  }

  // Under Impl::mutex_, while the caller holds a reference.
  void LeaveSessions() {
    if (std::exchange(idle_, false)) server_->idle_.erase(idle_at_);
    server_->sessions_.erase(this->shared_from_this());
  }

  // Ends a connection that is no longer in sessions_.
  void Evict() {
    asio::post(stream_.get_executor(), [self = this->shared_from_this()] { self->Close(); });
  }

 private:
  void Read() {
    if (server_->stopping_) return Close();
    busy_ = false;
    head_ = false;
    {
      std::lock_guard<std::mutex> lock(server_->mutex_);
      idle_at_ = server_->idle_.insert(server_->idle_.end(), this);
      idle_ = true;
    }
    parser_.emplace();
    parser_->header_limit(static_cast<uint32_t>(options_.max_header_bytes));
    parser_->body_limit(options_.max_body_bytes);
    // One deadline for the whole request: a byte now and then does not move it.
    stream_.expires_after(absl::ToChronoNanoseconds(options_.timeout));
    bhttp::async_read_header(
        stream_, buffer_, *parser_,
        [self = this->shared_from_this()](error_code error, size_t) { self->OnHeader(error); });
  }

  // A connection is idle until a whole header is there: a slow one is no better than a silent one.
  void OnHeader(error_code error) {
    if (!LeaveIdle()) return Close();
    if (error) return OnReadError(error);
    const Head& head = parser_->get();
    version_ = head.version();
    head_ = head.method() == bhttp::verb::head;
    if (auto refusal = Refusal(head); refusal.has_value())
      return WriteAndClose(*std::move(refusal));
    // HTTP/1.0 has no 100.
    if (!parser_->is_done() && version_ >= 11 &&
        beast::iequals(head[bhttp::field::expect], "100-continue")) {
      Request request = RequestOf(head);
      request.waits = true;
      return Handle(std::move(request), &Session::OnWaiting);
    }
    ReadBody();
  }

  // False if the connection was evicted.
  bool LeaveIdle() {
    std::lock_guard<std::mutex> lock(server_->mutex_);
    if (server_->sessions_.count(this->shared_from_this()) == 0) return false;
    if (std::exchange(idle_, false)) server_->idle_.erase(idle_at_);
    return true;
  }

  // What the handler says to a request whose body is not sent yet.
  void OnWaiting(Response response) {
    if (response.status != 100) {
      keep_alive_ = false;  // the body may come all the same
      parser_.reset();
      return Write(std::move(response));
    }
    busy_ = false;
    if (server_->stopping_) return Close();
    go_on_ = bhttp::response<bhttp::empty_body>(bhttp::status::continue_, 11);
    bhttp::async_write(stream_, go_on_,
                       [self = this->shared_from_this()](error_code error, size_t) {
                         if (error) return self->Close();
                         self->ReadBody();
                       });
  }

  void ReadBody() {
    if (parser_->is_done()) return OnRequest();
    parser_->eager(true);
    bhttp::async_read_some(
        stream_, buffer_, *parser_,
        [self = this->shared_from_this()](error_code error, size_t) { self->OnBody(error); });
  }

  void OnBody(error_code error) {
    if (error) return OnReadError(error);
    // Counted as it comes: who announces much and sends nothing takes nothing.
    const uint64_t more = parser_->get().body().size() - reserved_;
    reserved_ += more;
    const uint64_t limit = std::max(options_.max_body_bytes, options_.max_total_body_bytes);
    if (server_->body_bytes_.fetch_add(more) + more > limit) {
      Response busy = ErrorResponse(
          503, absl::StrCat("all requests at once have over ", limit, " bytes; try again"));
      busy.headers.emplace_back("Retry-After", "1");
      return WriteAndClose(std::move(busy));
    }
    ReadBody();
  }

  void OnReadError(error_code error) {
    if (error == bhttp::error::body_limit) {
      return WriteAndClose(ErrorResponse(
          413, absl::StrCat("body: the limit is ", options_.max_body_bytes, " bytes")));
    }
    if (error == bhttp::error::header_limit) {
      return WriteAndClose(ErrorResponse(
          431, absl::StrCat("headers: the limit is ", options_.max_header_bytes, " bytes")));
    }
    // Beast's own errors are about what was sent; the others are of a connection that is gone.
    const bool broken = error.category() == make_error_code(bhttp::error::bad_method).category() &&
                        error != bhttp::error::end_of_stream &&
                        error != bhttp::error::partial_message;
    if (broken) return WriteAndClose(ErrorResponse(400, "not HTTP: " + error.message()));
    Close();
  }

  void OnRequest() {
    auto message = parser_->release();
    parser_.reset();
    keep_alive_ = message.keep_alive();
    Request request = RequestOf(message);
    request.body = std::move(message.body());
    stream_.expires_never();
    Handle(std::move(request), &Session::Write);
  }

  // Without the body.
  Request RequestOf(const Head& head) const {
    Request request;
    request.method = head_ ? "GET" : ToString(head.method_string());
    request.path = PathOf(head.target());
    for (const auto& field : head)
      request.headers[absl::AsciiStrToLower(ToString(field.name_string()))] =
          ToString(field.value());
    request.client = client_;
    return request;
  }

  void Handle(Request request, void (Session::*then)(Response)) {
    busy_ = true;
    // Keeps the context running until the answer is there.
    auto work = std::make_shared<asio::executor_work_guard<asio::io_context::executor_type>>(
        server_->context_.get_executor());
    request.post = [self = this->shared_from_this(), work](std::function<void()> function) {
      asio::post(self->stream_.get_executor(), std::move(function));
    };
    server_->handler_(std::move(request),
                      [self = this->shared_from_this(), work, then](Response response) {
                        asio::post(self->stream_.get_executor(),
                                   [self, work, then, response = std::move(response)]() mutable {
                                     (self.get()->*then)(std::move(response));
                                   });
                      });
  }

  void WriteAndClose(Response response) {
    server_->Refused(response.status);
    keep_alive_ = false;
    parser_.reset();  // what was received, before Write gives its bytes back to the budget
    Write(std::move(response));
  }

  void Write(Response response) {
    busy_ = true;
    server_->body_bytes_ -= std::exchange(reserved_, 0);
    answer_ = bhttp::response<bhttp::string_body>(bhttp::int_to_status(response.status), version_);
    answer_.set(bhttp::field::content_type, response.content_type);
    for (const auto& [name, value] : response.headers) answer_.set(name, value);
    answer_.keep_alive(keep_alive_ && !server_->stopping_);
    answer_.body() = std::move(response.body);
    answer_.prepare_payload();
    // A length there would be that of the answer which the client has.
    if (answer_.result() == bhttp::status::not_modified) answer_.content_length(boost::none);
    if (head_) answer_.body().clear();  // the length stays
    stream_.expires_after(absl::ToChronoNanoseconds(options_.timeout));
    bhttp::async_write(stream_, answer_,
                       [self = this->shared_from_this()](error_code error, size_t) {
                         std::string().swap(self->answer_.body());
                         if (error) return self->Close();
                         if (!self->answer_.keep_alive()) {
                           return self->server_->stopping_ ? self->Close() : self->CloseGently();
                         }
                         self->Read();
                       });
  }

  // Reads on for a moment: closing over unread bytes would reset the connection, and the client
  // might not see the answer.
  void CloseGently() {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    stream_.expires_after(std::chrono::seconds(2));
    Discard();
  }

  void Discard() {
    buffer_.clear();
    stream_.async_read_some(buffer_.prepare(65536),
                            [self = this->shared_from_this()](error_code error, size_t) {
                              if (error || self->server_->stopping_) return self->Close();
                              self->Discard();
                            });
  }

  void Close() {
    server_->body_bytes_ -= std::exchange(reserved_, 0);
    stream_.close();
    std::lock_guard<std::mutex> lock(server_->mutex_);
    LeaveSessions();
  }

  Impl* const server_;
  const ServerOptions& options_;
  beast::tcp_stream stream_;
  std::string client_;
  beast::flat_buffer buffer_;
  std::optional<bhttp::request_parser<bhttp::string_body>> parser_;
  bhttp::response<bhttp::empty_body> go_on_;
  bhttp::response<bhttp::string_body> answer_;
  unsigned version_ = 11;
  bool keep_alive_ = false;
  bool head_ = false;
  bool busy_ = false;      // with a request that the handler has, until its answer is written
  uint64_t reserved_ = 0;  // of body_bytes_
  // The place in Impl::idle_, if it is there; guarded by Impl::mutex_.
  bool idle_ = false;
  std::list<Session*>::iterator idle_at_;
};

void Server::Impl::Accept() {
  acceptor_.async_accept(asio::make_strand(context_), [this](error_code error, tcp::socket socket) {
    if (stopping_ || error == asio::error::operation_aborted) return;
    if (error) {
      // Out of descriptors, mostly: pause instead of spinning on the error.
      TERN_LOG_WARN("http: accept: {}", error.message());
      retry_.expires_after(std::chrono::milliseconds(50));
      retry_.async_wait([this](error_code stopped) {
        if (!stopped) Accept();
      });
      return;
    }
    error_code ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    std::shared_ptr<Session> session, evicted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (static_cast<int>(sessions_.size()) >= options_.max_connections && !idle_.empty()) {
        evicted = idle_.front()->shared_from_this();
        evicted->LeaveSessions();
      }
      if (static_cast<int>(sessions_.size()) < options_.max_connections) {
        session = std::make_shared<Session>(this, std::move(socket));
        sessions_.insert(session);
      }
    }
    if (evicted != nullptr) evicted->Evict();
    if (session != nullptr) {
      session->Start();
    } else {
      Refused(503);
    }
    Accept();
  });
}

void Server::Impl::Shutdown(absl::Duration grace) {
  if (stopping_.exchange(true)) return;
  asio::post(acceptor_.get_executor(), [this] {
    error_code ignored;
    acceptor_.close(ignored);
    retry_.cancel();
  });
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const std::shared_ptr<Session>& session : sessions_) session->Stop();
  }
  const absl::Time deadline = Clock::Real()->Now() + grace;
  while (Clock::Real()->Now() < deadline) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (sessions_.empty()) break;
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  context_.stop();
  for (std::thread& thread : threads_) thread.join();
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { Shutdown(absl::ZeroDuration()); }

int Server::port() const { return impl_->port(); }

void Server::Shutdown(absl::Duration grace) { impl_->Shutdown(grace); }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      Handler handler) {
  auto impl = std::make_unique<Impl>(options, std::move(handler));
  const absl::Status status = impl->Listen();
  if (!status.ok()) return status;
  return std::unique_ptr<Server>(new Server(std::move(impl)));
}

}  // namespace tern::http
